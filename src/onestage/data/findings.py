"""What was found in a data set, put into few words."""

from collections.abc import Iterable, Sequence

from onestage.types import AnnotationSet, Finding

NUM_QUOTED = 3  # lines of what was left out that a training quotes


def start_messages(annotations: AnnotationSet) -> list[str]:
    """Return what a training says about a split when it starts: what was left out, and each other warning."""
    skipped = annotations.skipped
    messages = [f.line for f in annotations.findings if f.effect == "warning"]
    if skipped:
        more = len(skipped) - NUM_QUOTED
        lines = [*skipped[:NUM_QUOTED], *([f"and {more} more"] if more > 0 else [])]
        found = f"{annotations.source}: {len(skipped)} boxes or images were left out:"
        messages.append("\n  ".join([found, *lines]))
    return messages


def grouped(findings: Iterable[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """Return the findings by effect and rule, the gravest first, in the order in which they were found."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: EFFECTS.index(finding.effect)):
        groups.setdefault((finding.effect, finding.rule), []).append(finding)
    return groups


EFFECTS: Sequence[str] = ("error", "left out", "warning", "note")
