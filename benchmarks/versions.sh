#!/usr/bin/env bash
# The version matrix: tests on several releases of PyTorch, kernels compiled by several of Triton.
#
#   benchmarks/versions.sh [FOLDER]            default: build/versions; finished rows are not repeated
#   PIP_OPTIONS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url \
#       https://pypi.org/simple" benchmarks/versions.sh      PyTorch without CUDA: far smaller
#   TORCHES="2.8.0:python3.11:numpy==2.3.*" TRITONS=3.4.0 MATCH="dice_ce" benchmarks/versions.sh
#
# Writes results/versions.csv: what, its version, with what, the outcome. A version that cannot be
# installed gets "not tried". Needs no GPU, some 10 GB of disk and hours; PyTorch's releases are
# tried in virtual environments of FOLDER, and nothing outside FOLDER is changed.
set -uo pipefail
cd "$(dirname "$0")/.."
# Triton 3.4 links for AMD's GPUs with ROCm's linker; LLVM's own will do (Debian: lld-19).
lld=$(compgen -c ld.lld | sort -V | tail -n 1)
if [ -n "$lld" ]; then
    export TRITON_HIP_LLD_PATH=${TRITON_HIP_LLD_PATH:-$(command -v "$lld")}
fi
folder=$(realpath -m "${1:-build/versions}")
table=${TABLE:-results/versions.csv}
python=${PYTHON:-.venv/bin/python}
tritons=${TRITONS-3.4.0 3.6.0 3.7.1 3.9.0}
targets=${TARGETS:-sm_75 sm_80 sm_89 sm_90 sm_100 sm_120 gfx90a gfx942 gfx950 gfx1100}
torches=${TORCHES-2.8.0:python3.11:numpy<2.4 2.11.0:python3.12:numpy==2.5.* \
    2.11.0:python3.12:numpy<2.4 2.13.0:python3.11:numpy==2.4.*}
tests=${TESTS:-tests/test_kernels.py tests/test_norm_act.py tests/test_dice_ce.py \
    tests/test_voxel_shuffle.py tests/test_losses.py tests/test_mirror_unet.py tests/test_patches.py}
match=${MATCH:-}
mkdir -p "$folder"
[ -f "$table" ] || echo "what,version,with,outcome" > "$table"

row() { # WHAT VERSION WITH OUTCOME: replaces the row of the same first three columns
    sed -i "\#^$1,$2,$3,#d" "$table"
    echo "$1,$2,$3,$4" >> "$table"
    echo "$1 $2 ($3): $4"
}
done_before() { grep "^$1,$2,$3," "$table" | grep -qv "not tried"; }

for version in $tritons; do
    place=$folder/triton-$version
    if [ ! -d "$place/triton" ]; then
        "$python" -m pip install -q --no-deps --target "$place" ${PIP_OPTIONS:-} \
            "triton==$version" || rm -rf "$place"
    fi
    new=""
    for target in $targets; do
        done_before triton "$version" "$target" || new+=" $target"
    done
    report=$folder/triton-$version.txt
    rm -f "$report"
    if [ -n "$new" ] && [ -d "$place" ]; then # shellcheck disable=SC2086
        PYTHONPATH=$place TRITON_CACHE_DIR=$folder/cache-$version "$python" benchmarks/budget.py \
            --no-launches --targets $new --match "$match" > "$report" 2> "$report.err"
    fi
    for target in $new; do
        outcome="not tried"
        compiled=$(grep -c " $target " "$report" 2> /dev/null) # a line per kernel
        if [ "${compiled:-0}" -gt 0 ]; then
            failed=$(grep -c " $target: " "$report.err")
            over=$(($(grep -c " $target .*<-" "$report") - failed))
            outcome="$((compiled - failed)) of $compiled compile; $over over budget"
            if [ "$failed" -eq "$compiled" ]; then # for example, no linker for AMD's GPUs
                why=$(grep -m 1 " $target: " "$report.err" | sed "s/.* $target: //" | tr ',#' ';;')
                outcome="none of $compiled compile: ${why:0:90}"
            fi
        elif [ -f "$report" ]; then
            outcome="failed: $(tail -n 1 "$report.err" | tr ',#' ';' | cut -c 1-100)"
        fi
        row triton "$version" "$target" "$outcome"
    done
done

for entry in $torches; do
    IFS=: read -r version program numpy <<< "$entry"
    with="$program $numpy"
    done_before torch "$version" "$with" && continue
    place=$folder/torch-$version
    outcome="not tried"
    if [ ! -x "$place/bin/pytest" ] && command -v "$program" > /dev/null; then
        "$program" -m venv "$place" && "$place/bin/pip" install -q ${PIP_OPTIONS:-} \
            "torch==$version" triton "$numpy" nibabel scipy matplotlib tqdm pytest || rm -rf "$place"
    fi
    if [ -x "$place/bin/pytest" ]; then
        "$place/bin/pip" install -q ${PIP_OPTIONS:-} "$numpy" # another row may have chosen another
        # shellcheck disable=SC2086
        outcome=$("$place/bin/python" -m pytest -q -p no:cacheprovider $tests 2>&1 |
            tee "$folder/torch-$version.log" | tail -n 1 | tr ',' ';' | cut -c 1-120)
    fi
    row torch "$version" "$with" "$outcome"
done
