"""Counts and times in Prometheus' words, in a registry of the service's own."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """What the service counts. Every request that is received is counted once, under what became of it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "vitrail_requests", "Requests by route and status; 499 is a client that left", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.refusals = Counter(
            "vitrail_refusals", "Requests that were refused, by the code in the answer", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.admitted = Counter(
            "vitrail_admitted", "Requests for answers that were let in", registry=self.registry
        )
        self.finished = Counter(
            "vitrail_finished", "Requests for answers that were let in and got one, of any status",
            registry=self.registry,
        )  # fmt: skip
        self.images = Counter(
            "vitrail_images", "Pictures by model and what became of them", ["model", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "vitrail_request_seconds", "From the head of a request to the end of its answer", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "vitrail_stage_seconds", "Time of a picture in each stage, of a batch in infer", ["stage"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "vitrail_batch_images", "Pictures in one batch", buckets=SIZES, registry=self.registry
        )
        self.inside = Gauge(
            "vitrail_inside_images", "Pictures of requests that are let in", ["model"], registry=self.registry
        )
        self.inside_bytes = Gauge(
            "vitrail_inside_bytes", "Bytes of requests that are let in", ["model"], registry=self.registry
        )
        self.restarts = Counter(
            "vitrail_decoder_restarts", "Decoders that ended and were replaced", registry=self.registry
        )
        self.swaps = Counter(
            "vitrail_swaps", "Models taken over or refused after their folder changed", ["model", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.ready = Gauge("vitrail_ready", "1 while requests are taken", registry=self.registry)

    def observe(self, stage: str, value: float) -> None:
        """What decoders and batchers report."""
        if stage == "restart":
            self.restarts.inc()
        elif stage == "batch":
            self.batches.observe(value)
        else:
            self.stages.labels(stage).observe(value)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
