#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: `--dist loadgroup` does not keep the tests of an
# `xdist_group` together. The marks are there, no warning says anything, and each process takes
# every other test, so that a module's fixture (a compiled model, a server) is made in both. With
# pytest 8.4.2 all of them go to one process. `--dist loadfile` keeps a file together with both.
# Exit status 0: as described. 1: it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/test_group.py" <<'P'
import os
import pytest


@pytest.mark.xdist_group("model")
@pytest.mark.parametrize("i", range(8))
def test_one(i):
    with open(os.environ["SEEN"], "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
P
workers() {  # PYTEST DIST: how many processes ran tests of the group
  local venv="$work/venv-$1"
  if [ ! -d "$venv" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q "pytest==$1" pytest-xdist==3.8.0
  fi
  rm -f "$work/seen"
  (cd "$work" && SEEN="$work/seen" "$venv/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist "$2" > "$work/out")
  [ "$(wc -l < "$work/seen")" = 8 ]
  sort -u "$work/seen" | wc -l | tr -d ' '
}
new=$(workers 9.2.0 loadgroup)
old=$(workers 8.4.2 loadgroup)
file=$(workers 9.2.0 loadfile)
echo "one group of 8 tests, 2 processes: pytest 9.2.0 loadgroup ran it in $new, 8.4.2 in $old; 9.2.0 loadfile in $file"
[ "$new" = 2 ] && [ "$old" = 1 ] && [ "$file" = 1 ]
