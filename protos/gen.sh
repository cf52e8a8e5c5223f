#!/usr/bin/env bash
# Regenerates the committed stubs beside the .proto files. `make protos` calls it; CI fails if the result differs.
set -euo pipefail
cd "$(dirname "$0")"
python="$(command -v "${PYTHON:-python3}")"
PATH="$(dirname "$python"):$PATH" # protoc looks up protoc-gen-mypy_grpc there
"$python" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. octavo/v1/*.proto
"$python" -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=quiet:. octavo/v1/{inference,scheduler,worker}.proto
