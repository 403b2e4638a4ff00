#!/bin/sh
# Trains on a folder of images, serves the model, and asks the server what an image shows:
#   sh examples/folder_to_server.sh FOLDER IMAGE [OPTIONS OF convoy train]
# FOLDER has one folder for each class: FOLDER/cat/*.jpg, FOLDER/dog/*.jpg, ... Writes runs/ and models/.
set -eu
folder=$1 image=$2
shift 2

convoy train "$folder" --name my-images "$@"

socket=$(mktemp -d)/grpc.sock
convoy serve --model-repository models --grpc-socket "$socket" --http-port 0 --metrics-port 0 &
server=$!
trap 'kill $server; wait $server' EXIT
until convoy status --target "unix:$socket" 2>&1 | grep -q ': ready$'; do kill -0 $server; done

convoy classify "$image" --model my-images --target "unix:$socket"
