"""What a load is: how many requests of which shape, and how they arrive. It travels to the generator processes as JSON."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import asdict, dataclass, replace

from octavo.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """A load, or the share of it that one process generates. Lengths in tokens, times in seconds."""

    addresses: tuple[str, ...]  # of routers; or the base URL of a server that speaks OpenAI's API
    openai: bool = False
    token: str | None = None
    tls: bool = False
    tls_ca: str | None = None  # PEM
    model: str
    vocab_size: int
    requests: int
    concurrency: int  # streams open at once in a closed loop and while warming up
    rate: float | None = None  # requests a second in an open loop; None for a closed one
    input_len: int = 64
    output_len: int = 64
    prefix_len: int = 0  # first tokens of the input that all requests share
    prompt: str | None = None  # this text instead of random token ids
    temperature: float | None = None
    ignore_eos: bool = True
    seed: int = 0
    warmup: int = 0  # requests before the clock starts
    abandon_after: int | None = None  # hang up after so many tokens
    timeout: float = 600.0  # of one request
    first_request: int = 0  # index of this process's first request: the prompts don't depend on the number of processes
    bodies: tuple[
        str, ...
    ] = ()  # if any: all requests by index, as `body` makes them, instead of ones of these lengths

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> LoadSpec:
        """The inverse of `to_json`."""
        values = json.loads(line)
        return cls(**values | {name: tuple(values[name]) for name in ("addresses", "bodies")})

    def public(self) -> dict[str, object]:
        """For results: without secrets and addresses."""
        hidden = ("addresses", "token", "tls_ca", "first_request", "bodies")
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    def split(self, processes: int) -> list[LoadSpec]:
        """Shares for so many processes, or fewer where there is not enough to do for each."""
        processes = max(1, min(processes, self.requests, self.concurrency if self.rate is None else self.requests))
        shares = []
        first = self.first_request
        for index in range(processes):
            requests = _share(self.requests, processes, index)
            shares.append(
                replace(
                    self,
                    requests=requests,
                    concurrency=_share(self.concurrency, processes, index),
                    rate=None if self.rate is None else self.rate * requests / self.requests,
                    warmup=_share(self.warmup, processes, index),
                    first_request=first,
                )
            )
            first += requests
        return shares

    def arrivals(self) -> list[float]:
        """Seconds from the start at which each request of an open loop is due: a Poisson process."""
        if self.rate is None:
            raise ValueError("a closed loop has no arrival times")
        source = random.Random(f"{self.seed}/arrivals/{self.first_request}")
        due, result = 0.0, []
        for _ in range(self.requests):
            due += source.expovariate(self.rate)
            result.append(due)
        return result

    def request(self, index: int) -> bytes:
        """The serialised request of this index. Warm-up requests have negative indices."""
        if self.openai:
            return self._openai_request(index)
        if self.bodies and index >= 0:
            return base64.b64decode(self.bodies[index])
        message = pb.GenerateRequest(model=self.model)
        sampling = message.sampling
        sampling.max_tokens = self.output_len
        sampling.ignore_eos = self.ignore_eos
        sampling.seed = self.seed + index if index >= 0 else 0
        if self.temperature is not None:
            sampling.temperature = self.temperature
        if self.prompt is not None:
            message.text = self.prompt
        else:
            message.token_ids.ids.extend(self._prompt_token_ids(index))
        return message.SerializeToString()

    def _openai_request(self, index: int) -> bytes:
        request: dict[str, object] = {
            "model": self.model,
            "prompt": self._prompt_token_ids(index) if self.prompt is None else self.prompt,
            "max_tokens": self.output_len,
            "seed": self.seed + max(0, index),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:  # vLLM's and ours
            request["ignore_eos"] = True
        if self.temperature is not None:
            request["temperature"] = self.temperature
        return json.dumps(request).encode()

    def _prompt_token_ids(self, index: int) -> list[int]:
        vocabulary = range(self.vocab_size)
        # Warm-up must not put the shared prefix into the cache, or the first measured request would hit it.
        name = "prefix" if index >= 0 else "warm-up prefix"
        prefix = random.Random(f"{self.seed}/{name}").choices(vocabulary, k=self.prefix_len)
        own = random.Random(f"{self.seed}/{index}").choices(vocabulary, k=self.input_len - self.prefix_len)
        return prefix + own


def body(request: pb.GenerateRequest) -> str:
    """A request as `LoadSpec.bodies` holds it: base64 of its serialisation."""
    return base64.b64encode(request.SerializeToString()).decode()


def _share(total: int, parts: int, index: int) -> int:
    return total // parts + (1 if index < total % parts else 0)
