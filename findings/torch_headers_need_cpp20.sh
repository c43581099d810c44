#!/usr/bin/env bash
# torch 2.15.0: its headers no longer compile as C++17 (std::strong_ordering and rewritten comparisons);
# those of 2.13.0 compile as either. An op that is compiled at first use against the torch that runs
# fails where pip takes the newest, and no message names the standard: it has to ask for C++20.
# Exit status 0: as described. 1: it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
echo '#include <torch/library.h>' > "$work/op.cpp"
seen=""
for version in 2.13.0 2.15.0; do
    "$work/venv/bin/pip" install -q --no-deps --target "$work/$version" "torch==$version"
    for standard in 17 20; do
        if g++ "-std=c++$standard" -fsyntax-only -w "-I$work/$version/torch/include" "$work/op.cpp" 2> "$work/errors"; then
            result=compiles
        else
            result=fails
        fi
        echo "torch $version as C++$standard: $result; $(grep -m1 -o 'error: .*' "$work/errors" || echo 'no error')"
        seen+="$result "
    done
done
[ "$seen" = "compiles compiles fails compiles " ]
