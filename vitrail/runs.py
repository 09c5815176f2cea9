"""Run records: the whole truth of one run, for every verb. No torch here.

A record is what the command line fills, what a recipe file holds, what a job takes, and what is written
beside the results. The text under a field is its help on the command line. In `TrainRun`, `None` (or an
empty tuple) means that the plan chooses by model and data, and says so; a value given is never changed.
A comment line in a record is the heading of the flags below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
EnginePrecision = Literal["auto", "fp32", "bf16", "int8"]
EngineName = Literal["auto", "torch", "compiled", "onnxruntime", "openvino"]
Format = Literal["table", "json"]


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Train a model on a folder, archive or table of images: classes, boxes or masks."""

    # data and run
    data: tuple[str, ...]
    """Training images: folders, .zip or .tar archives, a .csv (image_path,label), a COCO .json, or the word digits."""
    val: tuple[str, ...] = ()
    """Validation images, where DATA has no val/ of its own; test/ never takes its place."""
    val_share: float = 0.1
    """Share of the training images kept for validation when there are none (0 = no validation)."""
    train_share: float = 1.0
    """Share of the training images of each class that is used; smaller shares lie within larger ones."""
    classes: tuple[str, ...] = ()
    """Boxes and masks: class names in the order of their numbers, or a .txt file with one name a line."""
    ignore: tuple[int, ...] = ()
    """Masks: values, besides 255, that are no class."""
    reduce_zero: bool = False
    """Masks: 0 is no class, and 1 is the first."""
    output: str | None = None
    """Run folder; by default runs/DATA-MODEL."""
    resume: str = "auto"
    """auto goes on where the run folder stands, none starts anew, a checkpoint folder starts from there."""
    recipe: str | None = None
    """A recipe: a TOML file, or the name of one that comes with vitrail; flags win over it."""

    # network
    model: str | None = None
    """Name of the network (see vitrail models)."""
    pretrained: str | None = None
    """Model folder or weight file to start from; the head is replaced when the classes differ."""
    backbone: str | None = None
    """Folder of a classification model whose backbone a network for boxes or masks starts from."""
    img_size: tuple[int, ...] = ()
    """Image size in pixels: one number, or rows and columns."""
    model_kwargs: tuple[str, ...] = ()
    """Fields of the network's config, as NAME=VALUE: patch_size=4 width=192 'backbone_changes={"stem": "conv"}'."""
    drop_path: float | None = None
    """Largest rate of stochastic depth, 0..1."""
    drop_path_subset: bool = False
    """Stochastic depth that leaves out a fixed number of pictures of each batch and does not compute their branch
    (DINOv2): faster."""
    patch_drop: float = 0.0
    """Share of each picture's patches that the last stage (a plain ViT has no other) goes without while training, 0 to
    below 1: quicker."""
    patch_drop_off: float = 0.1
    """Share of the run, at its end, in which all patches are seen, 0..1."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone trains only the head: a linear probe."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    teacher: str | None = None
    """Model folder of a teacher with the same classes, whose answers are learned beside the labels."""
    distill: Literal["hard", "soft"] = "hard"
    """What is learned of the teacher: its decision (DeiT), or its probabilities."""
    distill_weight: float = 0.5
    """Share of the teacher's term in the loss, 0..1."""
    distill_temperature: float = 3.0
    """Temperature of soft distillation."""

    # optimisation
    epochs: int | None = None
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int | None = None
    """Images in one step over all processes, before accumulation."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up before one optimiser step."""
    opt: Literal["adamw", "sgd", "muon"] | None = None
    """Optimiser."""
    lr: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Weight decay; biases, norms, positions and tokens are left out."""
    momentum: float | None = None
    """Momentum of SGD and Muon."""
    betas: tuple[float, float] | None = None
    """The two averaging rates of AdamW."""
    layer_decay: float | None = None
    """Factor on the learning rate for every block further from the head (1 = none)."""
    backbone_lr: float = 1.0
    """Factor on the learning rate for everything before the head, such as 0.1 (DETR, SETR); 0.1 with ten times the rate
    is a head that learns ten times as fast."""
    sched: Literal["cosine", "linear", "poly", "constant", "rsqrt", "step"] | None = None
    """Schedule of the learning rate after warm-up."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule."""
    clip_grad: float | None = None
    """Largest norm of the gradient (0 = no clipping)."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy over the classes, or binary cross-entropy of each (DeiT III; without smoothing)."""
    smoothing: float | None = None
    """Label smoothing, 0..1."""
    balance: float | None = None
    """Masks: how far rare classes count for more: pixels weigh (median share / share of their class) ^ balance; 0
    weighs all alike, 1 is median frequency balancing."""
    model_ema: float | None = None
    """Decay of the averaged weights that are evaluated and saved, such as 0.999 (0 = none)."""

    # augmentation
    crop: Literal["resized", "pad", "none"] | None = None
    """Training crop: random resized crop (boxes and masks: large-scale jitter), pad and crop (small images), or
    none."""
    scale: tuple[float, float] | None = None
    """Smallest and largest share of the picture in a random resized crop; for boxes and masks the smallest and
    largest factor of its size."""
    hflip: float | None = None
    """Probability of a left-right flip, 0..1."""
    aa: Literal["none", "rand", "trivial", "three"] | None = None
    """Augmentation policy: RandAugment, TrivialAugment, or 3-Augment (DeiT III)."""
    color_jitter: float | None = None
    """Strength of colour jitter, 0..1."""
    reprob: float | None = None
    """Probability of random erasing, 0..1."""
    mixup: float | None = None
    """Alpha of mixup (0 = none)."""
    cutmix: float | None = None
    """Alpha of cutmix (0 = none)."""
    mix_off: float = 0.0
    """Share of the run, at its end, without mixup and cutmix, 0..1."""
    aug_repeats: int = 1
    """Views of each image in an epoch (repeated augmentation)."""

    # evaluation and checkpoints
    eval_every: float = 1.0
    """Epochs between evaluations."""
    save_every: float = 1.0
    """Epochs between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, beside the best."""
    patience: int | None = None
    """Stop after this many evaluations without a better result."""
    max_bad_share: float = 0.005
    """Share of unreadable training images above which the run stops."""

    # machine
    seed: int = 0
    """Seed of everything random."""
    deterministic: bool = False
    """The same bits at every repeat, at some cost in speed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto takes bf16 where the hardware has it."""
    compile: bool = False
    """Compile the network's blocks with torch.compile."""
    shard: bool = False
    """Shard weights, gradients and optimiser over the processes (FSDP2)."""
    workers: int | None = None
    """Processes that load images."""
    resident: bool = False
    """Classes: keep the training pictures decoded on the device, and augment them there a batch at a time."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """Score a model on labelled images."""

    model: str
    """Model folder, run folder, or exported file."""
    data: tuple[str, ...]
    """Labelled images: folders, archives, a .csv, or the word digits."""

    # data
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Which part of the data; auto takes val, else test, else everything."""
    ignore: tuple[int, ...] = ()
    """Masks: values, besides 255, that are no class; by default as in the model's training."""
    reduce_zero: bool = False
    """Masks: 0 is no class, and 1 is the first; also where the model was trained so."""

    # inference
    window: int = 0
    """Masks: bring a picture's short side to this, keep its shape, and slide the network's input size over it; 0
    squashes every picture to the input size."""
    knn: tuple[str, ...] = ()
    """Labelled pictures, such as the training data: their nearest neighbours classify, in place of the model's head."""
    knn_k: int = 20
    """Number of neighbours that vote."""
    merge_tokens: int = 0
    """Plain ViTs: tokens merged into similar ones in every block (ToMe): faster, nearly the same answers (0 = none)."""

    # result
    output: str | None = None
    """Folder for the report, the confusion matrix and the worst mistakes; by default in the model's run."""
    format: Format = "table"
    """How the result is printed."""

    # machine
    engine: EngineName = "auto"
    """Inference engine; auto takes the fastest that was measured on this machine, and says which."""
    precision: EnginePrecision = "auto"
    """Number format; auto takes bf16 where the hardware has it; int8 takes what export --int8 made."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    batch_size: int = 64
    """Images in one batch; fewer where boxes or masks are found in large ones."""
    workers: int | None = None
    """Processes that load images."""


@dataclass(frozen=True, kw_only=True)
class PredictRun:
    """Say what is in images."""

    model: str
    """Model folder, run folder, or exported file."""
    images: tuple[str, ...]
    """Image files, folders of them, or patterns."""

    # inference
    top_k: int = 5
    """Classes named for each image."""
    threshold: float = 0.5
    """Boxes: smallest score of a box in the result, 0..1."""
    window: int = 0
    """Masks: bring a picture's short side to this, keep its shape, and slide the network's input size over it; 0
    squashes every picture to the input size."""
    merge_tokens: int = 0
    """Plain ViTs: tokens merged into similar ones in every block (ToMe): faster, nearly the same answers (0 = none)."""

    # result
    draw: str | None = None
    """Boxes and masks: folder for drawings, and for masks as index PNGs; by default predictions."""
    format: Literal["table", "json", "jsonl", "csv", "coco"] = "table"
    """How the result is printed; coco is for boxes: COCO's json, each box with its score."""
    output: str | None = None
    """File for the result, instead of the terminal."""

    # machine
    engine: EngineName = "auto"
    """Inference engine; auto takes the fastest that was measured on this machine, and says which."""
    precision: EnginePrecision = "auto"
    """Number format; auto takes bf16 where the hardware has it; int8 takes what export --int8 made."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    batch_size: int = 32
    """Images in one batch; fewer where boxes or masks are found in large ones."""
    workers: int | None = None
    """Threads that read images; with cluster, processes that predict (by default one for each core or GPU)."""
    cluster: bool = False
    """Run as a Ray Data job, over many machines if Ray has them; writes parquet into output, and goes on where it
    stopped. Images may also be a .parquet, a .txt list of addresses, or addresses such as s3://."""


@dataclass(frozen=True, kw_only=True)
class TraceRun:
    """Show how one image becomes a prediction, step by step."""

    model: str
    """Model folder, run folder, or the name of a network (random weights then)."""
    image: str
    """The image file."""
    output: str | None = None
    """Folder for trace.png and trace.html; by default trace/IMAGE."""
    format: Format = "table"
    """How the steps are printed."""
    top_k: int = 5
    """Classes shown at the end."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""


@dataclass(frozen=True, kw_only=True)
class ExplainRun:
    """Show where a model looks and why it says what it says; with --score, how far to trust the map."""

    model: str
    """Model folder, run folder, or the name of a network (random weights then)."""
    images: tuple[str, ...]
    """Image files, folders of them, or patterns; with --score also a whole data set."""

    # question
    class_: str | None = None
    """Class to explain, by name or number; by default the predicted one."""
    box: int | None = None
    """Detectors: which box, by falling score from 0; with --class, of that class. By default the first, 0."""

    # method
    method: tuple[str, ...] = ()
    """auto, all, or names: attention rollout relevance gradcam integrated_gradients occlusion."""
    layer: int | None = None
    """Layer of attention or gradcam, from 0, or from the end: -1 is the last."""
    head: int | None = None
    """Head of attention; by default the mean over heads."""
    token: str = ""
    """Token whose attention is shown: class, distillation or a number."""
    steps: int = 32
    """Steps of integrated gradients."""

    # faithfulness
    score: bool = False
    """Measure deletion and insertion of the map, beside those of a random map and of a map of the centre."""
    samples: int = 100
    """Pictures of a data set that are scored (0 = all)."""
    seed: int = 0
    """Seed of random maps and of the choice of samples."""

    # result
    page: bool = True
    """Write a page on which every patch shows what it attends to."""
    output: str | None = None
    """Folder for the results; by default explain/IMAGE or explain/DATA."""
    format: Format = "table"
    """How the result is printed."""

    # machine
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""


@dataclass(frozen=True, kw_only=True)
class InspectRun:
    """Draw the figures of the papers for a model of your own."""

    model: str
    """Model folder, run folder, or the name of a network (random weights then)."""
    images: tuple[str, ...] = ()
    """Pictures, folders or archives for the figures that need some; without them, only what the weights tell."""
    samples: int = 32
    """Pictures in all, where folders or archives have more."""
    output: str | None = None
    """Folder for the figures; by default inspect/MODEL."""
    format: Format = "table"
    """How the findings are printed."""
    seed: int = 0
    """Seed of the choice of pictures."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""


@dataclass(frozen=True, kw_only=True)
class ConvertRun:
    """Bring weights from one layout into another."""

    source: str
    """Model folder or weight file of any layout that vitrail recognises."""
    target: str
    """Where the result goes: a folder, or a .safetensors file."""
    layout: str = "vitrail"
    """Layout of the result: vitrail (a model folder), timm, transformers ..."""
    model: str | None = None
    """Name of the network, when the weights alone do not tell."""
    averaged: bool = False
    """Of a training checkpoint that holds averaged weights too (EMA), take those."""
    half: bool = False
    """Round to float16: half the size; the receipt says how far the numbers moved."""


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """Write a model as one file for other programs, and prove on real pictures that it answers the same."""

    model: str
    """Model folder, or run folder."""

    # file
    format: Literal["onnx", "openvino", "torch", "triton"] = "onnx"
    """onnx: one file. openvino: a folder. torch: a torch.export program. triton: a model repository."""
    output: str | None = None
    """File or folder to write; by default export/MODEL with the format's ending."""
    free_size: bool = True
    """Leave height and width free where the network allows it; with fixed ones, engines optimise further."""

    # quantisation
    int8: bool = False
    """Quantise to int8 after training, with --format openvino; needs pictures like those that the model will see."""
    calibrate: tuple[str, ...] = ()
    """Pictures for the calibration of int8, training pictures best."""
    calibration_samples: int = 300
    """Calibration pictures that are used."""

    # proof
    data: tuple[str, ...] = ()
    """Pictures for the proof, labelled or not; by default crops of two photographs that come with scikit-learn."""
    samples: int = 256
    """Pictures of the data that are used (0 = all)."""
    report: Format = "table"
    """How the proof is printed."""
    seed: int = 0
    """Seed of the choice of pictures."""


@dataclass(frozen=True, kw_only=True)
class DataCheckRun:
    """Look for what is wrong with a data set before it is trained on."""

    data: tuple[str, ...]
    """Training images: folders, archives, a .csv, or the word digits."""
    val: tuple[str, ...] = ()
    """Validation images, where DATA has no val/ of its own."""
    classes: tuple[str, ...] = ()
    """Boxes and masks: class names in the order of their numbers, or a .txt file with one name a line."""
    ignore: tuple[int, ...] = ()
    """Masks: values, besides 255, that are no class."""
    reduce_zero: bool = False
    """Masks: 0 is no class, and 1 is the first."""
    output: str | None = None
    """Folder for report.json and the contact sheet; by default data-check."""
    format: Format = "table"
    """How the result is printed."""
    workers: int | None = None
    """Threads that read images."""


@dataclass(frozen=True, kw_only=True)
class ModelsRun:
    """List the networks: parameters, GFLOPs, input size."""

    pattern: str = "*"
    """Which names: a shell pattern such as vit_*_384, or a part of the name."""
    format: Format = "table"
    """How the list is printed."""


@dataclass(frozen=True, kw_only=True)
class InfoRun:
    """Show the card of a network, a model folder or a weight file."""

    model: str
    """Name of a network, model folder, run folder, or weight file of any known layout."""
    format: Format = "table"
    """How the card is printed."""


@dataclass(frozen=True, kw_only=True)
class DoctorRun:
    """Check the installation; name each problem with its cure."""

    format: Format = "table"
    """How the findings are printed."""


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """Measure a network's speed, memory, parameters and FLOPs."""

    model: str
    """Name of a network, or a model folder."""

    # measurement
    mode: Literal["both", "train", "inference"] = "both"
    """Training steps, inference, or both."""
    batch_size: int = 16
    """Images in one batch."""
    img_size: tuple[int, ...] = ()
    """Image size in pixels: one number, or rows and columns; by default the network's own."""
    peers: bool = False
    """Measure timm's and transformers' network of the same shape in the same run, in turns."""
    merge_tokens: int = 0
    """Plain ViTs: measure inference with so many tokens merged in every block (ToMe), too (0 = none)."""
    repeats: int = 10
    """Timed rounds; best and median are printed."""

    # machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format; auto takes bf16 where the hardware has it."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    # result
    format: Format = "table"
    """How the result is printed."""


@dataclass(frozen=True, kw_only=True)
class CompareRun:
    """Train families side by side at equal budget on your data, and measure what picture size costs them."""

    data: tuple[str, ...] = ()
    """Training images: folders, archives, a .csv, or the word digits."""

    # data
    val: tuple[str, ...] = ()
    """Validation images, where DATA has no val/ of its own."""
    classes: tuple[str, ...] = ()
    """Boxes and masks: class names in the order of their numbers, or a .txt file with one name a line."""
    ignore: tuple[int, ...] = ()
    """Masks: values, besides 255, that are no class."""
    reduce_zero: bool = False
    """Masks: 0 is no class, and 1 is the first."""

    # comparison
    part: Literal["both", "accuracy", "cost"] = "both"
    """What is compared: accuracy on the data, cost against picture size, or both."""
    output: str = "runs/compare"
    """Folder for the trainings, the numbers and the report; a comparison that was stopped goes on there."""

    # accuracy
    models: tuple[str, ...] = ()
    """Names of networks to train; by default our small one of every family."""
    epochs: int | None = None
    """Equal budget in passes over the data; by default 5."""
    minutes: float | None = None
    """Equal budget in minutes of training instead; steps follow from each network's measured speed."""
    shares: tuple[float, ...] = (1.0,)
    """Shares of the training pictures, for the data-efficiency curve: 0.1 0.25 0.5 1."""
    seeds: int = 1
    """Trainings of each network, with seeds from 0; the table shows mean and spread."""
    batch_size: int | None = None
    """Images in one step; by default 128, and 8 of boxes and masks."""
    img_size: tuple[int, ...] = ()
    """Image size for training; by default each network's own."""
    opt: Literal["adamw", "sgd", "muon"] | None = None
    """Optimiser for all; by default as the plan chooses."""
    lr: float | None = None
    """Learning rate for all; by default as the plan chooses."""

    # cost
    cost_models: tuple[str, ...] = ()
    """Networks whose cost is measured; by default one for each way of growing, with boxes and masks those trained."""
    sizes: tuple[int, ...] = (224, 384, 512, 768, 1024)
    """Picture sides at which cost is measured."""
    repeats: int = 3
    """Timed rounds at each size; the fastest counts."""

    # machine
    workers: int | None = None
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """Train a small ViT on built-in digits, evaluate it, predict with it, and trace one image."""

    output: str = "demo"
    """Folder for everything that the demo makes."""


@dataclass(frozen=True, kw_only=True)
class ServeRun:
    """Answer over HTTP what is in pictures, and show why on a page."""

    models: tuple[str, ...]
    """Model folders, run folders or names of models that ship; NAME=FOLDER gives one a name."""

    # address and access
    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine only with a token."""
    port: int = 8000
    """Port to listen on (0 = any free one)."""
    token_file: str | None = None
    """File whose first line every request must carry as its bearer token."""
    allow_host: tuple[str, ...] = ()
    """Further names under which browsers may call the service."""
    fetch_from: tuple[str, ...] = ()
    """Hosts (HOST or HOST:PORT) that pictures may be fetched from by URL; none by default."""

    # answers
    exact: bool = True
    """Batch only where the bits of an answer stay those of the picture alone."""
    batch_size: int = 32
    """Most pictures in one batch."""
    deadline: float = 10.0
    """Seconds until a request is answered 504."""
    engine: EngineName = "auto"
    """Inference engine; auto takes the fastest on this machine, measured at the first start where it was not before."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Precision = "auto"
    """Number format; auto takes bf16 where the hardware has it."""
    explain: bool = True
    """Answer /explain and /story: heat maps, and a picture's way through the network."""
    page: bool = True
    """Serve the page at /, on which pictures can be tried."""

    # bounds
    queue_images: int = 256
    """Most pictures of one model in work at once; more are refused with 503."""
    queue_megabytes: int = 256
    """Most megabytes of request bodies of one model in work at once; more are refused with 503."""
    body_megabytes: int = 32
    """Largest request body, in megabytes."""
    megapixels: float = 50.0
    """Largest picture, in millions of pixels."""
    decoders: int | None = None
    """Processes that decode pictures; by default one a core, at most 8."""
    decoder_megabytes: int = 1024
    """Most memory of one decoding process, in megabytes."""
    decode_seconds: float = 5.0
    """Most CPU time for decoding one picture, in seconds."""

    # reloading, stopping, logging
    watch: float = 1.0
    """Seconds between looks at the model folders; a folder that has changed is taken over (0 = at SIGHUP only)."""
    drain: float = 30.0
    """Seconds that a stop waits for accepted requests."""
    log: Literal["text", "json"] = "text"
    """How requests are logged."""
