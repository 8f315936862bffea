#!/bin/sh
# Install the pinned PyTorch into a virtual environment: usage  install_torch.sh PATH/TO/python
#
# With an NVIDIA driver: the default build. Without one: a CPU build, from a wheel that pip finds on this
# machine, else from PyTorch's own CPU index. TORCH_INDEX=URL overrides all of that.
set -eu
python=$1
here=$(dirname "$0")
torch=$(grep '^torch==' "$here/../constraints.txt")
pip="$python -m pip install --quiet --disable-pip-version-check"
cpu_index=https://download.pytorch.org/whl/cpu

if [ -n "${TORCH_INDEX:-}" ]; then
    echo "PyTorch: $torch from $TORCH_INDEX (TORCH_INDEX)"
    $pip --force-reinstall --index-url "$TORCH_INDEX" --no-deps "$torch"
elif "$python" -c 'import torch' 2>/dev/null; then
    echo "PyTorch is installed already: $("$python" -c 'import torch; print(torch.__version__)')"
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "PyTorch: $torch, the default build with CUDA, since this machine has an NVIDIA driver"
    $pip "$torch"
elif $pip --no-index --no-deps "$torch" >/dev/null 2>&1; then
    echo "PyTorch: $torch, from a wheel on this machine (no NVIDIA driver here)"
elif $pip --index-url "$cpu_index" --retries 0 --timeout 20 --no-deps "$torch" 2>/dev/null; then
    echo "PyTorch: $torch, the CPU build of $cpu_index (no NVIDIA driver here)"
else
    echo "PyTorch: $torch, pip's default build. This machine has no NVIDIA driver, but no CPU wheel was found and"
    echo "$cpu_index cannot be reached, so this may fetch several GB of CUDA packages that it will not use."
    echo "To take another source: rm -r .venv; make install TORCH_INDEX=URL"
    $pip "$torch"
fi
