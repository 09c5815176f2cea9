"""Admission control: how many pictures and bytes each model may have in work at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vitrail.serve.refusals import Refusal


@dataclass
class Ticket:
    """A request's share of what its model may have in work; handed back once, whatever happened."""

    admission: Admission
    images: int
    size: int
    open: bool = True

    def resize(self, images: int, size: int) -> None:
        """Another share, known better now. Raises Refusal when there is no room for more."""
        self.admission.room(images - self.images, size - self.size)
        self.admission.images += images - self.images
        self.admission.bytes += size - self.size
        self.images, self.size = images, size

    def release(self) -> None:
        """The share is free again."""
        if self.open:
            self.open = False
            self.admission.images -= self.images
            self.admission.bytes -= self.size


class Admission:
    """Pictures and bytes in work, from the first byte of a request to the last of its answer.

    Args:
        images: most pictures at once.
        size: most bytes of bodies at once.
        pace: seconds that one picture takes now.
        patience: seconds that the last of the pictures may have to wait; who would wait longer is refused at once,
            since an answer that comes too late costs as much as one in time.
    """

    def __init__(self, images: int, size: int, pace: Callable[[], float], patience: float = 3600.0) -> None:
        self.most_images, self.most_bytes, self.patience = images, size, patience
        self.images = self.bytes = 0
        self.pace = pace

    def enter(self, images: int, size: int) -> Ticket:
        """A ticket. Raises Refusal `full` where there is no room, with the time until there may be."""
        self.room(images, size)
        self.images += images
        self.bytes += size
        return Ticket(self, images, size)

    def room(self, images: int, size: int) -> None:
        """Raise Refusal `full` when so much more does not fit in."""
        after = self.images + images
        too_many = images > 0 and after > self.most_images
        too_late = images > 0 and self.images > 0 and after * self.pace() > self.patience
        if too_many or too_late or (size > 0 and self.bytes + size > self.most_bytes):
            raise Refusal("full", retry_after=round(min(30.0, self.images * self.pace())))
