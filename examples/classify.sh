#!/bin/sh
# Asks a server over HTTP which digit an image shows: sh examples/classify.sh [IMAGE [HOST:PORT [MODEL]]]
set -eu
image=${1:-examples/digits/7.png} server=${2:-127.0.0.1:8000} model=${3:-mnist}

python - "$image" <<'END' |
import json, sys
from PIL import Image

image = Image.open(sys.argv[1]).convert("L")
images = {"name": "images", "datatype": "UINT8", "shape": [1, 1, image.height, image.width], "data": list(image.tobytes())}
three_classes = {"name": "probabilities", "parameters": {"classification": 3}}
print(json.dumps({"inputs": [images], "outputs": [three_classes]}))
END
  curl --silent --show-error --fail-with-body --data @- "http://$server/v2/models/$model/infer"
