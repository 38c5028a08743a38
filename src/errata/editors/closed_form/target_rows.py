"""The rows of tokens behind the optimisation of targets, and what is read off them.

A delta has one row for each of its requests in each context, and one, "{subject} is a", on which it
should change nothing. Where noise hides a request's subject, each context has a draw of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from errata.lm.load import LanguageModel
from errata.lm.noise import Hidden, hidden
from errata.lm.tokens import encode_requests
from errata.requests import Request


@dataclass
class TargetRows:
    """The token rows of one micro-batch, flat, with what is scored where.

    Rows of the divergence stand apart: one token of each is recomputed, so that beside the others
    they would be padding for the most part.
    """

    ids: list[list[int]]
    starts: list[int]
    owner: Tensor
    """(rows,) which delta each row belongs to."""
    score_row: Tensor
    """(m,) row of each scored token; its column counts from the subject's last token."""
    score_column: Tensor
    score_token: Tensor
    score_weight: Tensor
    """(m,) 1 / (target's length * number of the owner's rows), so that a sum is the mean loss."""
    kl_ids: list[list[int]]
    """Each delta's row "{subject} is a", cut at the subject's last token."""
    share: Tensor
    """(rows,) 1 / number of the owner's rows."""
    less: Tensor
    """(rows,) whether the target should be said less there, instead of more."""
    open_ended: Tensor
    """(deltas,) whether there is no point at which the target is reached."""
    veils: list[Hidden | None]
    """What hides the subject of each row."""
    kl_veils: list[Hidden | None]

    @property
    def width(self) -> int:
        """The longest row."""
        return max(map(len, self.ids))

    @property
    def remaining(self) -> int:
        """The most tokens that a row has from the subject's last one on."""
        return max(len(ids) - start for ids, start in zip(self.ids, self.starts, strict=True))


def rows_of(
    lm: LanguageModel, groups: Sequence[Sequence[Request]], prefixes: Sequence[str]
) -> TargetRows:
    """Rewriting rows (contexts x requests) and one divergence row for each group."""
    requests = [request for group in groups for request in group]
    group_of = [g for g, group in enumerate(groups) for _ in group]
    ids: list[list[int]] = []
    starts: list[int] = []
    owner: list[int] = []
    score: list[tuple[int, int, int, float]] = []
    veils: list[Hidden | None] = []
    for draw, prefix in enumerate(prefixes):
        encoded_rows = encode_requests(lm, requests, prefix=prefix)
        veils += hidden(lm, requests, encoded_rows, draw=draw)
        for group, encoded in zip(group_of, encoded_rows, strict=True):
            weight = 1 / (len(encoded.answer) * len(prefixes) * len(groups[group]))
            first = encoded.prompt_length - 1 - encoded.subject_last
            score += [
                (len(ids), first + j, token, weight) for j, token in enumerate(encoded.answer)
            ]
            ids.append(encoded.ids[:-1])  # the last target token is predicted, never read
            starts.append(encoded.subject_last)
            owner.append(group)
    # Read at the subject's last token, as the reference code does: what follows is never seen.
    identity = [replace(group[0], prompt="{} is a") for group in groups]
    identity_rows = encode_requests(lm, identity, target=False)
    kl_ids = [encoded.ids[: encoded.subject_last + 1] for encoded in identity_rows]
    shares = torch.tensor([1 / (len(prefixes) * len(group)) for group in groups])
    row, column, token, weights = zip(*score, strict=True)
    return TargetRows(
        ids,
        starts,
        torch.tensor(owner),
        torch.tensor(row),
        torch.tensor(column),
        torch.tensor(token),
        torch.tensor(weights),
        kl_ids,
        share=shares[owner],
        less=torch.tensor([request.problem.minimised for request in requests] * len(prefixes)),
        open_ended=torch.tensor([any(r.problem.open_ended for r in group) for group in groups]),
        veils=veils,
        kl_veils=hidden(lm, identity, identity_rows),
    )


@dataclass
class Plan:
    """Which rows and scores are run for the deltas that are still moving."""

    select: Tensor | None
    """The rows; None if all."""
    owner: Tensor
    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor
    score_owner: Tensor
    kl_select: Tensor | None
    share: Tensor
    less: Tensor

    @staticmethod
    def of(rows: TargetRows, active: Tensor, n: int, device: torch.device) -> Plan:
        """The plan where only these deltas are active."""
        rank = torch.full((n,), -1)
        rank[active] = torch.arange(len(active))
        owner = rank[rows.owner]
        select = torch.nonzero(owner >= 0)[:, 0]
        new_row = torch.full((len(rows.ids),), -1)
        new_row[select] = torch.arange(len(select))
        scored = torch.nonzero(new_row[rows.score_row] >= 0)[:, 0]
        everything = len(active) == n
        return Plan(
            select=None if everything else select,
            owner=owner[select].to(device),
            row=new_row[rows.score_row[scored]],
            column=rows.score_column[scored],
            token=rows.score_token[scored],
            weight=rows.score_weight[scored],
            score_owner=rank[rows.owner[rows.score_row[scored]]],
            kl_select=None if everything else active,
            share=rows.share[select].to(device),
            less=rows.less[select].to(device),
        )

    def losses(self, logits: Tensor) -> Tensor:
        """(m, vocab) -> (a,), the mean over each delta's rows of what is to become small.

        That is -log p(target) / len(target) =: NLL or, where the target is to be said less,
        exp(-NLL) (Hase et al. 2023), whose gradient vanishes once it is not said any more.
        """
        device = logits.device
        nll = cross_entropy(logits.float(), self.token.to(device), reduction="none")
        nll = nll * self.weight.to(device)
        owner, deltas = self.score_owner.to(device), int(self.owner.max()) + 1
        if self.less.any():
            rows = nll.new_zeros(len(self.owner)).index_add(0, self.row.to(device), nll)
            nll = torch.where(self.less, (-rows / self.share).exp() * self.share, rows)
            owner = self.owner
        return nll.new_zeros(deltas).index_add(0, owner, nll)


def bare_rows(rows: TargetRows, n: int) -> list[int]:
    """The first row of each delta: its bare prompt."""
    first: dict[int, int] = {}
    for index, owner in enumerate(rows.owner.tolist()):
        first.setdefault(owner, index)
    return [first[i] for i in range(n)]
