"""Export: one file that holds preprocessing after decoding, the network and its decoding, with its card inside.

    wrap        the module that is exported: uint8 images in, logits and probabilities out
    program     torch.export, with a free batch and, where the family allows, free height and width
    onnx, openvino, torch_program, triton
                the files, the last a model repository for NVIDIA Triton
    manifest    what travels inside them: the card, and what must be known of the file itself
    quantise    int8 after training, with calibration on the user's images
    parity      the proof: real pictures through the exported file and through the network (parity_dense: boxes, masks)

Resizing stays outside, in its one reference implementation (data.transforms.Preprocess): what the file wants to
be shown stands in the card that travels inside it.
"""
