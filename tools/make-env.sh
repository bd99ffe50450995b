#!/bin/sh
# Makes or renews the environment. torch comes first and alone, under constraints.txt, so that nothing else pulls another build of it.
# Usage: tools/make-env.sh FOLDER [PYTHON]
set -eu
folder=$1
here=$(dirname "$0")
python=$("$here/preflight.sh" "${2:-}")

if [ ! -x "$folder/bin/python" ]; then
    echo "making $folder with $python"
    "$python" -m venv "$folder"
fi
echo "installing gpumarket and what it needs into $folder (some minutes the first time)"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
