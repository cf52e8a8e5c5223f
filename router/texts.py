"""Text to tokens and back, and what can be asked for: what every door offers beside generation."""

from __future__ import annotations

import time

from octavo.v1 import inference_pb2

from router.assets import AssetStore, ModelAssets
from router.models import KnownModel, ModelDirectory
from router.prepare import Preparation, TextPool
from router.resolve import ModelLimits, check_vocabulary
from router.validate import MAX_DETOKENIZE_IDS, Violations, check_chat


class Texts:
    """Holds nothing of any request. Every error is an OctavoError."""

    def __init__(self, models: ModelDirectory, assets: AssetStore, preparation: Preparation, pool: TextPool) -> None:
        self._models = models
        self._assets = assets
        self._preparation = preparation
        self._pool = pool

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Text or chat to ids, by the very code that requests are prepared with."""
        kind = request.WhichOneof("input")
        wrong = Violations()
        if kind is None:
            wrong.add("input", "one of text and chat must be set")
        elif kind == "chat":
            check_chat(request.chat, wrong)
        wrong.raise_if_any()
        model, assets = await self.model(request.model)
        limits = ModelLimits(model.max_model_len, model.vocab_size)
        prompt, now = "", time.time()
        if kind == "chat":
            prompt, ids = await self._preparation.tokenize_chat(request.chat, assets, limits, now)
        else:
            ids = await self._preparation.tokenize(request, assets, limits, now)
        return inference_pb2.TokenizeResponse(token_ids=ids, prompt=prompt, max_model_len=model.max_model_len)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Ids to text."""
        count = len(request.token_ids)
        wrong = Violations()
        wrong.require(count <= MAX_DETOKENIZE_IDS, "token_ids", f"must have at most {MAX_DETOKENIZE_IDS} entries")
        wrong.raise_if_any()
        model, assets = await self.model(request.model)
        skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")

        def work() -> str:
            ids = list(request.token_ids)
            check_vocabulary("token_ids", ids, model.vocab_size)
            return assets.decode(ids, skip)

        text = await self._pool.run_plain(4 * count, work)
        return inference_pb2.DetokenizeResponse(text=text)

    def list_models(self) -> inference_pb2.ListModelsResponse:
        """What some worker holds now."""
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=model.name,
                    digest=model.digest.hex(),
                    max_model_len=model.max_model_len,
                    vocab_size=model.vocab_size,
                    workers=model.workers,
                    ready=self._assets.ready(model.digest),
                    quantization=model.quantization,
                )
                for model in self._models.all()
            ]
        )

    async def model(self, name: str) -> tuple[KnownModel, ModelAssets]:
        """The model of this name with its text side."""
        model = self._models.find(name)
        return model, await self._assets.get(model.digest)
