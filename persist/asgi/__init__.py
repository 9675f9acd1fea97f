"""A chat server on a store: an app for any ASGI server, with sessions, turns, resumable streams and a page.

    from persist.asgi import Text, create_app

    async def answer(conversation):
        async for token in model(conversation.messages):
            yield Text(token)

    app = create_app("var/sessions", answer)

Any number of workers may run it on one directory. A turn runs in the worker that started it, and is followed, stopped
and resumed through every other one. It needs the extra `server`: ``pip install 'persist-sessions[server]'``.
"""

try:
    from persist.asgi.app import create_app as create_app
except ModuleNotFoundError as error:
    remedy = "persist.asgi needs it: pip install '.[server]', in a checkout of persist"
    raise ModuleNotFoundError(f"{error}. {remedy}", name=error.name) from None
from persist.asgi.parts import Error as Error
from persist.asgi.parts import Part as Part
from persist.asgi.parts import Reasoning as Reasoning
from persist.asgi.parts import Text as Text
from persist.asgi.parts import ToolInput as ToolInput
from persist.asgi.parts import ToolOutput as ToolOutput
from persist.asgi.responder import Conversation as Conversation
from persist.asgi.responder import Echo as Echo
from persist.asgi.responder import OpenAI as OpenAI
from persist.asgi.responder import Responder as Responder
from persist.asgi.responder import echo as echo
from persist.asgi.responder import openai as openai
