"""NVIDIA's client on a gateway: `triton_conformance.py HTTP GRPC TENSORS.npz < KEY`. Prints a JSON document; raises where it is off."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http

IMAGES, TELEMETRY = "shape-classifier", "telemetry-anomaly"


def refused(work: Any, *words: str) -> None:
    try:
        work()
    except Exception as error:
        assert any(word in str(error) for word in words), error
        return
    raise AssertionError(f"{words} was expected")


def check(client: Any, module: Any, headers: dict[str, str], tensors: Any, **raw: Any) -> tuple[float, int]:
    """Health, metadata, inference and errors; the share of right labels, and how many things were looked at."""
    named = {"headers": headers}
    assert client.is_server_live(**named) and client.is_server_ready(**named)
    assert client.is_model_ready(IMAGES, **named)
    if module is over_grpc:
        server, model = client.get_server_metadata(**named, as_json=True), client.get_model_metadata(IMAGES, **named, as_json=True)
    else:
        server, model = client.get_server_metadata(**named), client.get_model_metadata(IMAGES, **named)
    assert server["name"] == "gpumarket" and "binary_tensor_data" in server["extensions"]
    assert model["platform"] == "onnx" and [i["name"] for i in model["inputs"]] == ["image"]
    version = model["versions"][0]
    assert client.is_model_ready(IMAGES, version, **named)

    def tensor(name: str, array: Any) -> Any:
        made = module.InferInput(name, list(array.shape), "FP32")
        made.set_data_from_numpy(array, **raw)
        return made

    images, labels = tensors["images"], tensors["labels"]
    answer = client.infer(IMAGES, [tensor("image", images)], request_id="seven", **named)
    assert answer.as_numpy("scores").shape == (len(images), 4)
    right = float((answer.as_numpy("label") == labels).mean())
    again = client.infer(IMAGES, [tensor("image", images)], version, outputs=[module.InferRequestedOutput("label")], **named)
    assert (again.as_numpy("label") == answer.as_numpy("label")).all() and again.as_numpy("scores") is None
    scores = client.infer(TELEMETRY, [tensor("telemetry", tensors["readings"])], **named)
    assert len(scores.as_numpy(model_output(client, module, named))) == len(tensors["readings"])
    refused(lambda: client.infer(IMAGES, [tensor("picture", images)], **named), "picture")
    refused(lambda: client.infer("nothing", [tensor("image", images)], **named), "nothing")
    refused(lambda: client.infer(IMAGES, [tensor("image", images)], headers={}), "API key", "401")
    return right, 8


def model_output(client: Any, module: Any, named: dict[str, Any]) -> str:
    more = {"as_json": True} if module is over_grpc else {}
    name: str = client.get_model_metadata(TELEMETRY, **named, **more)["outputs"][0]["name"]
    return name


def main() -> None:
    http_url, grpc_url, file = sys.argv[1:]
    bearer = {"authorization": f"Bearer {sys.stdin.read().strip()}"}
    tensors = np.load(file)
    # a copy each: the client writes its binary header into the headers that it is given
    with over_http.InferenceServerClient(http_url) as client:
        first = check(client, over_http, dict(bearer), tensors, binary_data=True)
        check(client, over_http, dict(bearer), tensors, binary_data=False)
    with over_grpc.InferenceServerClient(grpc_url) as client:
        second = check(client, over_grpc, bearer, tensors)
    print(json.dumps({"right": min(first[0], second[0]), "checked": first[1] + second[1]}))


if __name__ == "__main__":
    main()
