"""The transaction: a block that changes one session. It is one commit, whose cost depends only on the change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from persist.arguments import require_text
from persist.errors import InvalidArgument, VersionMismatch, reserved
from persist.json_codec import same
from persist.storage.content import HEADER, Content, decode
from persist.turn import IDLE
from persist.working_copy import Fields, WorkingCopy, WorkingList

Result = TypeVar("Result")


class Transaction:
    """A session while a block changes it. `Store.transaction` hands it out, and `Store.update` passes it on.

    It reads only the values that the block asks for. When the block ends, it commits the values that it handed out, as
    they are then. A block that raises writes nothing.

    Attributes:
        version: in the block, the version that was read, or None for a session that is about to be created. After the
            block, the version that was committed.
    """

    __slots__ = ("_copy", "_may_delete", "is_deleted", "version")

    def __init__(self, copy: WorkingCopy, may_delete: Callable[[], None]) -> None:
        self._copy = copy
        self._may_delete = may_delete
        self.is_deleted = False
        self.version = copy.version

    def __repr__(self) -> str:
        return f"<persist.Transaction at version {self.version}>"

    @property
    def fields(self) -> Fields:
        """Every top-level value except ``messages`` and ``tool_calls``, as a mapping that is changed in place."""
        return self._open().fields

    def list(self, name: str) -> WorkingList:
        """Return a top-level list, to be changed in place. The first item creates a missing list.

        Raises:
            InvalidArgument: the value is no list.
        """
        require_text("a list's name", name)
        return self._open().list(name)

    @property
    def data(self) -> dict[str, Any]:
        """The whole document as a plain dict.

        From its first use on, the commit takes this dict. The cost grows with the whole session then.
        """
        return self._open().data

    def delete(self) -> None:
        """Remove the session when the block ends, together with all changes of the block.

        Raises:
            SessionBusy: a live stream owns it.
        """
        self._open()
        self._may_delete()
        self.is_deleted = True

    def _open(self) -> WorkingCopy:
        self._copy.require_open()
        if self.is_deleted:
            raise InvalidArgument(what="a transaction", expected="left after its delete()", got="used again")
        return self._copy

    def result_of(self, function: Callable[[Transaction], Result]) -> Result:
        """Call a function with this transaction, and return its result.

        Raises:
            InvalidArgument: it is no plain function. Or it returned a new document, and changed nothing.
        """
        if not callable(function):
            raise InvalidArgument(what="function", expected="callable", got=type(function).__name__)
        result = function(self)
        if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
            # The body of such a function has not run, or not to its end.
            raise InvalidArgument(what="function", expected="a plain function", got="an async one or a generator")
        # A dict with other keys is no document. It may be the answer to a request.
        is_document = isinstance(result, dict) and any(name in result for name in self._copy.names())
        is_new = is_document and not self._copy.has_handed_out(result)
        if is_new and not self.is_deleted and self._copy.changed() is None:
            expected = "one that changes the transaction in place: tx.fields.update(…), tx.data.update(…)"
            got = "one that returned a new dict"
            raise InvalidArgument(what="the function of update()", got=got, expected=expected)
        return result


def require_version(copy: WorkingCopy, session_id: str, if_version: str | None) -> None:
    """Raise `VersionMismatch` unless the session has the version that the caller has seen. None accepts any version."""
    if if_version is not None and copy.version != if_version:
        facts: dict[str, Any] = {"base": if_version, "mine": if_version, "theirs": copy.version}
        reason = "the session has moved on"
        raise VersionMismatch(session_id=session_id, path=(HEADER, "commit"), reason=reason, **facts)


def refuse_changed_stream_fields(before: Content, after: Content) -> None:
    """Raise `InvalidArgument` if an edit touched a field that belongs to the stream verbs."""
    for name, idle in IDLE.items():
        field = before.fields.get(name)
        if field is after.fields.get(name) and (field or not (name in before.apart or name in after.apart)):
            continue
        found, left = before.get(name), after.get(name)
        if found != left and not same(*(idle if value is None else decode(value) for value in (found, left))):
            remedy = "Use store.start_stream(), store.cancel() or session.clear_stale_stream()."
            raise reserved(name, remedy)
