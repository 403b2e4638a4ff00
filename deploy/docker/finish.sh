#!/bin/sh
# The last step of a build stage, in /build: writes the list of contents, removes what no program of the image needs, and
# compiles the rest. Unchecked bytecode holds no times, so that two builds are equal, and no start reads a source twice.
set -eu
environment=/opt/convoy
packages=$(echo "$environment"/lib/python3*/site-packages)

"$environment/bin/python" -m pip uninstall --quiet --yes "$@"
/opt/sbom/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --mc-type application \
  --output-file "$environment/sbom.cdx.json" "$environment/bin/python"

find "$packages" -depth -type d \( -name tests -o -path '*/torch/test' -o -path '*/onnx/backend/test' \) -exec rm -r {} +
if [ -d "$packages/torch/bin" ]; then
  find "$packages/torch/bin" -mindepth 1 -depth ! -name torch_shm_manager -delete # the rest are torch's own tests, and protoc
fi
rm -f "$environment"/bin/[Aa]ctivate*
find "$environment" -depth -name __pycache__ -exec rm -r {} +
# Some packages ship templates that are not Python: pip passes over them, too.
"$environment/bin/python" -m compileall -qq --invalidation-mode unchecked-hash "$packages" || true
