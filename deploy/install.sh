#!/usr/bin/env bash
# Makes the environment of one service and proves that it holds all the service imports, and no more than it should.
#   deploy/install.sh router|scheduler|worker [DIRECTORY]
set -euo pipefail
case "${1:-}" in
router | scheduler | worker) ;;
*)
    echo "usage: deploy/install.sh router|scheduler|worker [DIRECTORY]" >&2
    exit 2
    ;;
esac
service="$1"
directory="$(realpath -m "${2:-$(dirname "$0")/../.venv-$service}")"
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m deploy.environment "$service" "$directory"
"$directory/bin/python" -m deploy.import_check "$service"
