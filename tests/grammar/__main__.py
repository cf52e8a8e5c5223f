"""Decode under 500 schemas with noise for logits and print what came out, refused schemas and all.

python -m tests.grammar [--count 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from octavo.models.pull import pull
from tokenizers import Tokenizer

from tests.grammar.judge import MAX_TOKENS, Verdict, candidates, choose, decode
from tests.grammar.tiny import llguidance_tokenizer, noise_prompts, sampling_with_bias, tiny_engine


def main() -> int:
    """1 where an output does not follow its schema."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = pull("smollm2")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    verdict = Verdict()
    schemas = choose(candidates(options.count), options.count, llguidance_tokenizer(model), verdict)
    with tempfile.TemporaryDirectory() as folder:
        engine = tiny_engine(Path(folder), model)
        begun = time.monotonic()
        decode(engine, tokenizer, schemas, noise_prompts(schemas), sampling_with_bias(tokenizer), verdict)
        engine.close()
    report = {
        "command": "python -m tests.grammar",
        "schemas": len(schemas),
        "real": [name for name in schemas if not name.startswith("made")],
        "max_tokens": MAX_TOKENS,
        "ends": dict(verdict.ends),
        "wrong": verdict.wrong,
        "refused": verdict.refused,
        "output_tokens": verdict.tokens,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(report, indent=2))
    for name in list(schemas)[5:15]:
        print(f"{name}: {verdict.texts[name][:160]!r}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if verdict.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
