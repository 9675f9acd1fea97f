"""The checkpointer of LangGraph.

    from persist.adapters.langgraph import PersistSaver

    graph = builder.compile(checkpointer=PersistSaver("var/threads"))
    graph.invoke({"messages": [("user", "hi")]}, {"configurable": {"thread_id": "t-1"}})

Each thread is a session. The thread's id is the session's id. `items` describes what a session holds.

Two runs on one thread overwrite each other's steps with the savers that came before (langgraph issue #8796). Here a run
that others have overtaken is refused, in any thread or process. `runs` has the rules.
"""

from persist.adapters.opening import not_installed

try:
    from persist.adapters.langgraph.runs import SupersededRun
    from persist.adapters.langgraph.saver import PersistSaver
except ModuleNotFoundError as error:
    raise not_installed("langgraph", error) from None

__all__ = ["PersistSaver", "SupersededRun"]
