"""One process' share of an ask: handle, check and fold, site by site.

The local exchange runs one crew in its own process, or one in each forked worker; whatever carries the
work, a reply is judged and folded where it was made, and one partial sum goes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from server.exchange import Handler
from strategies.exact import Fold, Partial
from strategies.protocol import CODES, Failure, Instruction, Refused, Reply, Spec, Tree, Update

_KEPT = 256  # sites: of ten thousand, each asked now and then, memory would hold them all


class Crew:
    """Sites by name, made when asked, the latest kept; and the partial they fold into."""

    def __init__(self, sites: Callable[[str], Handler]) -> None:
        self._factory = sites
        self._sites: OrderedDict[str, Handler] = OrderedDict()

    def start(self, fold: Fold, spec: Spec, place: Callable[[int], Tensor] | None = None) -> None:
        """Begin an ask."""
        self._fold, self._spec = fold, spec
        self.partial: Partial = fold.start(spec, place)

    def run(self, instruction: Instruction, common: Tree, age: int = 0) -> Failure | None:
        """Ask one site and fold its answer; why not, where it cannot be."""
        name = instruction.site
        reply = self._site(name).handle(instruction, common)
        try:
            update = accepted(reply, name, self._spec)
        except Refused as refusal:
            failure = reply.body if isinstance(reply.body, Failure) else Failure(refusal.code)
            self.partial.failures[name] = failure
            return failure
        self._fold.add(self.partial, self._spec, name, instruction.epoch, update, age)
        return None

    def _site(self, name: str) -> Handler:
        if name not in self._sites:
            self._sites[name] = self._factory(name)
            if len(self._sites) > _KEPT:
                self._sites.popitem(last=False)
        self._sites.move_to_end(name)
        return self._sites[name]


def accepted(reply: Reply, site: str, spec: Spec) -> Update:
    """The update of a reply that may be folded.

    Raises:
        Refused: with the site's own failure code, or the reason for quarantine.
    """
    body = reply.body
    if reply.site != site:
        raise Refused("addressee", reply.site)
    if isinstance(body, Failure):
        raise Refused(body.code if body.code in CODES else "internal")
    if not isinstance(body, Update) or body.form != "plain":
        raise Refused("form", "no plain update")
    spec.check(body)
    return body
