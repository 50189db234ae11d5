#!/usr/bin/env bash
# What a GPU machine without a network may lack, as a folder to carry along: runs/packages (ignored by
# git). Run it where packages can be installed; the other jobs look there first.
#
#     gpu/packages.sh                # for Python 3.12; PYTHON=3.11 (this one) before a rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf runs/packages
pip install --quiet --target runs/packages --no-deps --only-binary=:all: --python-version "${PYTHON:-3.12}" \
  -c constraints.txt tyro typeguard docstring-parser rich markdown-it-py mdurl pygments zstandard \
  pytest pluggy iniconfig hypothesis sortedcontainers
find runs/packages -name "*.so" -exec strip --strip-debug {} + 2>/dev/null || true
du -sh runs/packages
