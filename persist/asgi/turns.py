"""The turns of this worker: each is claimed from the store, runs as a task, and ends with its answer or without.

A turn goes on when the page that asked for it is gone. Any worker may ask it to stop. If this worker is told to end,
its turns are cancelled, and what was said is kept. If it is killed, the last checkpoint is kept.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import persist.aio
from persist import json_codec, turn
from persist.asgi.exchange import Refused
from persist.asgi.parts import Answer, Error, Message, Part, Reasoning, Text, copied
from persist.asgi.responder import Conversation, Responder
from persist.log import log
from persist.view import ViewedList

#: How often a turn looks whether somebody has asked it to stop, in seconds.
LOOK_S = 0.2
#: How long a responder may go on after it was cancelled, in seconds.
GRACE_S = 5.0
#: How long the end of a turn is tried again while the store refuses it, and the pause between two tries, in seconds.
PATIENCE_S, PAUSE_S = 30.0, 0.5
#: Refusals that pass: somebody holds the lock, or the disk is full.
_PASSING = (persist.LockTimeout, persist.CommitFailed, persist.Unreadable)
#: The field that tells which stream has the last prompt, and the key of a partial answer that tells its last event.
TURN, OFFSET = "turn", "offset"
#: The key of a partial answer that a user stopped. A page tells it from one that a crash has cut off.
STOPPED = "stopped"
TITLE_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Started:
    """A turn that was started, or that had been started before. Its stream is None if nobody knows it any more."""

    stream_id: str | None
    message_id: str
    is_repeated: bool = False


class Turns:
    """The turns that run in this worker.

    Args:
        checkpoint_s: how often a running turn makes its partial answer durable.
    """

    def __init__(self, store: persist.aio.Store, responder: Responder, *, checkpoint_s: float) -> None:
        self._store, self._responder, self._checkpoint_s = store, responder, checkpoint_s
        self._running: set[asyncio.Task[None]] = set()  # the loop itself keeps no reference to a task

    async def start(self, session_id: str, prompt: Message, extra: Mapping[str, Any]) -> Started:
        """Start the turn of a prompt, once for each id of a prompt. A missing session is created.

        Raises:
            SessionBusy: another turn runs.
            Refused: the session has another message of that id.
            NotJSON: the prompt cannot be kept. No session is created.
        """
        json_codec.check(prompt, (turn.MESSAGES, 0))
        while True:
            try:
                view = await self._store.view(session_id)
            except persist.SessionNotFound:
                with suppress(persist.SessionExists):
                    await self._store.create(session_id, {"title": "", "messages": []})
                continue
            there = view.list(turn.MESSAGES).find(prompt["id"])
            if there is not None:
                # An interrupted turn counts, too. Only a retry runs it again.
                return _repeated(view, prompt, there)
            stream_id = uuid.uuid4().hex
            fields: dict[str, Any] = {TURN: {"prompt": prompt["id"], "stream_id": stream_id}}
            if not view.fields.get("title"):
                fields["title"] = " ".join(prompt["content"].split())[:TITLE_CHARACTERS]
            options: dict[str, Any] = {"stream_id": stream_id, "fields": fields, "once": True}
            try:
                stream = await self._store.start_stream(session_id, prompt, if_version=view.version, **options)
            except persist.AlreadyStarted as started:
                return Started(started.stream_id or _stream_in(started.answer), prompt["id"], is_repeated=True)
            except persist.VersionMismatch:
                continue  # the same prompt may have come and gone
            self._run(stream, prompt["id"], extra)
            return Started(stream_id, prompt["id"])

    async def retry(self, session_id: str, extra: Mapping[str, Any], *, prompt_id: object = None) -> Started:
        """Answer the last prompt again. As soon as the new answer says something, it takes the place of the old one.

        Args:
            prompt_id: the prompt that the client means. None means the last one, whichever that is.

        Raises:
            SessionNotFound: there is no such session.
            SessionBusy: a turn runs.
            Refused: there is no prompt, the last one is another one, or it has no id.
        """
        view = await self._store.view(session_id)
        prompt = next((each for each in reversed(view.list(turn.MESSAGES)) if _has_role(each, "user")), None)
        if prompt is None or prompt.get("id") is None:
            why = "has no prompt" if prompt is None else "ends with a prompt without an id"
            raise Refused(409, "nothing_to_retry", f"The session {why}, so nothing could be answered again.")
        if prompt_id not in (None, prompt["id"]):
            raise _changed()
        stream_id = uuid.uuid4().hex
        fields = {TURN: {"prompt": prompt["id"], "stream_id": stream_id}}
        options: dict[str, Any] = {"stream_id": stream_id, "fields": fields, "if_version": view.version}
        try:
            stream = await self._store.start_stream(session_id, prompt, **options)
        except persist.VersionMismatch:
            raise _changed() from None
        self._run(stream, prompt["id"], extra, is_again=True)
        return Started(stream_id, prompt["id"])

    async def stop(self, session_id: str, stream_id: str) -> bool:
        """Ask a stream of any worker to end. Tell whether it was running.

        Raises:
            SessionNotFound: there is no such session.
        """
        info = await self._store.stream(session_id)
        if info is None or info.stream_id != stream_id:
            return False
        return await self._store.cancel(session_id, stream_id) and info.is_live

    async def close(self) -> None:
        """Cancel the turns of this worker. Their partial answers are kept. It may be called again, or be cancelled."""
        for task in self._running:
            if not task.cancelling():  # a second one would break off the last checkpoint
                task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def _run(
        self, stream: persist.aio.Stream, prompt_id: str | int, extra: Mapping[str, Any], *, is_again: bool = False
    ) -> None:
        running = _Turn(self._store, self._responder, stream, prompt_id, self._checkpoint_s)
        task = asyncio.create_task(running.run(extra, is_again=is_again))
        self._running.add(task)
        task.add_done_callback(self._running.discard)


class _Turn:
    """A turn that runs. One task generates the answer, and another one watches it."""

    def __init__(
        self,
        store: persist.aio.Store,
        responder: Responder,
        stream: persist.aio.Stream,
        prompt_id: str | int,
        checkpoint_s: float,
    ) -> None:
        self._store, self._responder, self._stream, self._checkpoint_s = store, responder, stream, checkpoint_s
        self._prompt_id = prompt_id
        #: Whether the prompt has an earlier answer, which stays until this one says something.
        self._has_earlier = False
        self._answer = Answer(f"{stream.id}.answer")
        #: The last event. Under the lock, the events until then tell exactly the answer.
        self._offset, self._telling = 0, asyncio.Lock()

    async def run(self, extra: Mapping[str, Any], *, is_again: bool) -> None:
        """Run to the end. If the prompt is answered again, the earlier answer makes room for this one."""
        stream = self._stream
        try:
            async with stream:
                messages = list((await self._store.view(stream.session_id)).list(turn.MESSAGES))
                place = _place_of(messages, self._prompt_id)
                shown = [_as_told(each) for each in messages[: place + 1] if type(each) is dict]
                if is_again:
                    self._has_earlier = any(map(_says_something, _behind(messages, place)))
                    if not self._has_earlier:
                        await _until_taken(self._cut)
                try:
                    is_whole = await self._watch(Conversation(stream.session_id, stream.id, shown, extra))
                except asyncio.CancelledError:
                    self._answer.add(Error("The server was stopped in the middle of this answer."))
                    async with asyncio.timeout(GRACE_S):
                        await _until_taken(partial(self._end, is_whole=False))
                    raise
                ending = asyncio.create_task(_until_taken(partial(self._end, is_whole=is_whole)))
                try:
                    await asyncio.shield(ending)
                except asyncio.CancelledError:
                    await asyncio.wait([ending], timeout=GRACE_S)
                    ending.cancel()
                    raise
        except persist.StreamLost:
            pass  # the session was deleted or taken away, so the turn is over
        except Exception:
            log.exception("Session %r: its turn %s broke off", stream.session_id, stream.id)

    async def _end(self, *, is_whole: bool) -> None:
        """Store the answer, and end the stream. It may be called again if the store has refused."""
        message = self._answer.message()
        if is_whole:
            await self._stream.finish(message)
            return
        if not self._has_earlier and not (self._answer.is_silent and self._answer.error is None):
            await self._stream.checkpoint(message if "error" in message else {**message, STOPPED: True})
        await self._stream.fail()
        if self._has_earlier and self._answer.error is not None:
            log.warning("Session %r keeps its earlier answer: %s", self._stream.session_id, self._answer.error)

    async def _watch(self, conversation: Conversation) -> bool:
        """Let the responder answer, until it has ended or somebody stops it. Tell whether the answer is whole."""
        generating = asyncio.create_task(self._generate(conversation))
        kept, kept_at = 0, _now()
        try:
            while not generating.done():
                await asyncio.wait([generating], timeout=LOOK_S)
                if generating.done():
                    break
                if await self._is_cancelled():
                    return False
                if self._offset > kept and _now() - kept_at >= self._checkpoint_s:
                    kept, kept_at = await self._keep(), _now()
        finally:
            # Not in the middle of a part, which would be in the answer, and told to nobody.
            async with self._telling:
                generating.cancel()
            await asyncio.wait([generating], timeout=GRACE_S)
        # Nobody has cancelled it. So a cancellation is its own, of a task say, and a failure as any other.
        failure = _failure_of(generating)
        if isinstance(failure, persist.StreamLost):
            raise failure
        if failure is not None or (self._answer.is_silent and self._answer.error is None):
            log.error("Session %r: the answer broke off", conversation.session_id, exc_info=failure)
            # A disk that refuses the events may refuse this one, too. The stored answer tells it then.
            with suppress(persist.EmitFailed, *_PASSING):
                await self._tell(Error("The model failed to answer."))
        return self._answer.error is None

    async def _is_cancelled(self) -> bool:
        try:
            return await self._stream.is_cancelled()
        except persist.PersistError:
            return False  # the next look may be luckier

    async def _generate(self, conversation: Conversation) -> None:
        async with aclosing(_generator(self._responder(conversation))) as parts:
            async for each in parts:
                part = copied(each)
                if part in (Text(""), Reasoning("")):
                    continue
                await self._tell(part)
                if self._answer.error is not None:
                    return

    async def _tell(self, part: Part) -> None:
        async with self._telling:
            self._answer.add(part)
            if self._has_earlier and not self._answer.is_silent:
                await self._cut()
                self._has_earlier = False
            self._offset = await self._stream.emit(part.event())

    async def _cut(self) -> None:
        """Remove the earlier answer to the prompt."""
        await self._stream.update(lambda tx: _cut(tx, self._prompt_id))

    async def _keep(self) -> int:
        """Make the answer so far durable, and return the offset of its last event."""
        async with self._telling:
            message, offset = self._answer.message(), self._offset
        with suppress(*_PASSING):  # the next time may be luckier
            await self._stream.checkpoint({**message, OFFSET: offset})
        return offset


async def _until_taken(write: Callable[[], Awaitable[None]]) -> None:
    """Write to the store, and try again for a while if it refuses for now."""
    give_up_at = _now() + PATIENCE_S
    while True:
        try:
            return await write()
        except _PASSING:
            if _now() >= give_up_at:
                raise
        await asyncio.sleep(PAUSE_S)


def _failure_of(task: asyncio.Task[None]) -> BaseException | None:
    try:
        return task.exception()
    except asyncio.CancelledError as cancelled:
        return cancelled


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _generator(parts: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """Yield the same parts. This can be closed, and closes what can be closed."""
    try:
        async for part in parts:
            yield part
    finally:
        if hasattr(parts, "aclose"):
            await parts.aclose()


def _changed() -> Refused:
    return Refused(409, "changed", "The session has changed meanwhile. Look at it again.")


def _has_role(message: Any, role: str) -> bool:
    return type(message) is dict and message.get("role") == role


def _is_prompt(message: Any, prompt_id: object) -> bool:
    return prompt_id is not None and _has_role(message, "user") and message.get("id") == prompt_id


def _says_something(message: Any) -> bool:
    return _has_role(message, "assistant") and bool(message.get("content") or message.get("parts"))


def _place_of(messages: Sequence[Any], prompt_id: object) -> int:
    """Return the place of a prompt. If it is gone, this is the last place."""
    return max((at for at, each in enumerate(messages) if _is_prompt(each, prompt_id)), default=len(messages) - 1)


def _behind(messages: Sequence[Any], place: int) -> list[Any]:
    """Return the messages behind a place, until the next message of the user."""
    return [*itertools.takewhile(lambda each: not _has_role(each, "user"), messages[place + 1 :])]


def _cut(tx: persist.Transaction, prompt_id: str | int) -> None:
    messages = tx.list(turn.MESSAGES)
    place = messages.place_of(prompt_id)
    if place is not None:
        del messages[place + 1 : place + 1 + len(_behind(messages, place))]


def answer_to(messages: ViewedList, prompt_id: str | int) -> Message | None:
    """Return the stored answer to a prompt, or None."""
    linked = messages.find(prompt_id, turn.ANSWERS)  # quick, and a retried prompt has none
    found = _behind(messages, _place_of(messages, prompt_id)) if linked is None else [linked]
    return next((each for each in reversed(found) if _has_role(each, "assistant")), None)


def without_earlier(messages: list[Any], fields: Mapping[str, Any]) -> list[Any]:
    """Return the messages without the earlier answer to a prompt that is being answered again."""
    last = fields.get(TURN)
    place = _place_of(messages, last.get("prompt") if type(last) is dict else None)
    return messages[: place + 1] + messages[place + 1 + len(_behind(messages, place)) :]


def _repeated(view: persist.View, prompt: Message, there: Message) -> Started:
    if there.get("role") != "user" or there.get("content") != prompt["content"]:
        raise Refused(409, "conflict", "The session has another message of that id.")
    last = view.fields.get(TURN)
    if type(last) is dict and last.get("prompt") == prompt["id"]:
        return Started(last.get("stream_id"), prompt["id"], is_repeated=True)
    answer = answer_to(view.list(turn.MESSAGES), prompt["id"])
    return Started(_stream_in(answer), prompt["id"], is_repeated=True)


def _stream_in(answer: Any) -> str | None:
    """Return the stream that an answer came from, by its id."""
    answer_id = answer.get("id") if type(answer) is dict else None
    return answer_id.removesuffix(".answer") if isinstance(answer_id, str) and answer_id.endswith(".answer") else None


def _as_told(message: Message) -> Message:
    """Return a message without the keys that are only of use to the store."""
    ours = (turn.INTERRUPTED, turn.ANSWERS, OFFSET, STOPPED)
    return {key: value for key, value in message.items() if key not in ours}
