"""Asks a service with Triton's client: asks_with_triton.py HOST:PORT MODEL PICTURE... (base64); prints JSON."""

from __future__ import annotations

import base64
import json
import sys

import numpy as np
from tritonclient import http


def main(address: str, model: str, *texts: str) -> None:
    client = http.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
    told = client.get_model_metadata(model)
    pictures = np.array([base64.b64decode(text) for text in texts], dtype=np.object_)
    given = http.InferInput("pictures", [len(pictures)], "BYTES")
    given.set_data_from_numpy(pictures, binary_data=True)
    wanted = [
        http.InferRequestedOutput(name, binary_data=binary)
        for name in ("label", "probabilities")
        for binary in (True,)
    ]
    found = client.infer(model, [given], outputs=wanted, request_id="a", timeout=5_000_000)
    shape = next(entry["shape"] for entry in told["inputs"] if entry["name"] == "pixels")
    pixels = np.zeros([1, *shape[1:]], dtype=np.uint8)
    second = http.InferInput("pixels", list(pixels.shape), "UINT8")
    second.set_data_from_numpy(pixels)
    again = client.infer(model, [second])
    assert np.isclose(again.as_numpy("probabilities").sum(), 1.0)
    try:
        client.infer(model, [http.InferInput("pixels", [1, 3, 5, 5], "UINT8")])
        raise AssertionError("a wrong shape was taken")
    except http.InferenceServerException as error:
        assert "0x" not in str(error)
    print(
        json.dumps(
            {
                "label": [word.decode() for word in found.as_numpy("label")],
                "score": found.as_numpy("probabilities").max(axis=1).astype(float).tolist(),
                "pixels": pixels.size,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
