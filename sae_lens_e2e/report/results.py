"""What a report knows of its SAEs."""

from dataclasses import dataclass, field

from sae_lens_e2e.bench.members import Member, Skipped
from sae_lens_e2e.evaluation import Evaluation, TogetherEvaluation
from sae_lens_e2e.report.selection import baseline_of, factor
from sae_lens_e2e.saebench.results import CoreResults
from sae_lens_e2e.studies.directions import Directions
from sae_lens_e2e.studies.faithfulness import Faithfulness
from sae_lens_e2e.studies.geometry import Geometry


@dataclass
class Results:
    """What was found out about the SAEs of a report, by name, and what could not be."""

    members: list[Member]
    skipped: list[Skipped] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)
    """The SAEs that are looked at closely: one of each objective, of similar CE loss increase."""
    geometry: dict[str, list[Geometry]] = field(default_factory=dict)
    directions: dict[str, Directions] = field(default_factory=dict)
    faithfulness: dict[str, Faithfulness] = field(default_factory=dict)
    together: dict[str, TogetherEvaluation] = field(default_factory=dict)
    """By run, what the SAEs that were trained in it cost at once, as `evaluate` has left it beside them."""
    saebench: dict[str, CoreResults] = field(default_factory=dict)
    """SAEBench's figures on the same tokens, as `sae-lens-e2e saebench` has left them beside the SAEs."""
    reused: list[str] = field(default_factory=list)
    """Evaluations that were found beside the SAEs."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def member(self, name: str) -> Member:
        """The SAE of this name."""
        return next(member for member in self.members if member.name == name)

    @property
    def close(self) -> list[Member]:
        """The SAEs that are looked at closely."""
        return [self.member(name) for name in self.compared]

    @property
    def anchor(self) -> Member:
        """The one among these that those of other objectives are compared with."""
        if not self.evaluations:
            return self.close[0]
        baseline = baseline_of(self.evaluations)
        return next(member for member in self.close if member.objective == baseline)

    @property
    def seed_pairs(self) -> list[tuple[Member, Member]]:
        """For each objective two SAEs that differ in their seed only, if there are: the one looked at closely, or one like it."""
        pairs = []
        for one in self.close:
            same = [other for other in self.members if other.objective == one.objective]
            candidates = [(other, twin) for other in same if (twin := self._twin(other)) is not None]
            if candidates:
                pairs.append(min(candidates, key=lambda pair, one=one: self._unlikeness(one, pair[0])))
        return list(dict.fromkeys(pairs))

    def _twin(self, member: Member) -> Member | None:
        seeded = (other for other in self.members if None not in (other.seed, member.seed))
        return next((other for other in seeded if other.kind == member.kind and other.seed != member.seed), None)

    def _unlikeness(self, one: Member, other: Member) -> float:
        if one is other or not self.evaluations:
            return 0.0
        # More than any that differ in cost by nothing at all.
        return factor(*(self.evaluations[member.name].ce_loss_increase for member in (one, other)))

    @property
    def labels(self) -> dict[str, str]:
        """What SAEs go by in figures: those that are looked at closely by their objective, if it tells them apart."""
        objectives = [member.objective for member in self.close]
        if len(set(objectives)) < len(objectives):
            return {member.name: member.name for member in self.members}
        return {m.name: m.objective if m.name in self.compared else m.name for m in self.members}
