"""The verb that hands models to other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.cli import show

if TYPE_CHECKING:
    from vitrail.runs import ExportRun


def export(run: ExportRun) -> int:
    """What was written and what the proof found; 3 (by ProofError) when the artefact differs beyond the bounds."""
    from vitrail.jobs.export import export as job

    with show.messages() as handler, show.Counter("pictures", handler) as counter:
        found = job(run, counter)
    if run.report == "json":
        print(show.json_text(found.to_dict()))
        return 0
    proof, manifest = found.proof, found.manifest
    rows = [
        ["precision", manifest.precision],
        ["free", _free(manifest)],
        ["normalising", f"inside, {manifest.normalised_inside}; send uint8"],
        ["pictures", f"{proof.images} ({proof.pictures})"],
    ]
    rows += _agreement(proof)
    if manifest.quantisation:
        how = manifest.quantisation
        rows.append(["int8", f"{how['int8_products']} of {how['products']} products; {how['choice']}"])
    show.table(["proof", ""], rows)
    show.say(f"written: {found.artefact} ({found.size / 1e6:.1f} MB, {found.seconds:.0f} s)")
    show.say(f"proof:   {found.proof_file}")
    return 0


def _free(manifest: Any) -> str:
    """What of the images' shape is free."""
    if not manifest.free_size:
        return "batch"
    return f"batch, height ({manifest.rows}), width ({manifest.columns})"


def _agreement(proof: Any) -> list[list[str]]:
    """How far the artefact differs from the network, in rows."""
    if hasattr(proof, "rows"):  # of boxes and masks
        found: list[list[str]] = proof.rows()
        return found
    differ = f"{proof.logits_max:.1e} of the largest at most, {proof.logits_mean:.1e} on average"
    chances = f"{proof.probability_max:.1e} at most, {proof.probability_mean:.1e} on average"
    rows = [
        ["same first class", show.percent(proof.agreement)],
        ["logits differ", differ],
        ["probabilities differ", chances],
    ]
    if proof.accuracy_before is not None and proof.accuracy_after is not None:
        before, after = show.percent(proof.accuracy_before), show.percent(proof.accuracy_after)
        rows.append(["top-1", f"{before} before, {after} after"])
    return rows
