"""Tools: which the model may call, and whether it must."""

from __future__ import annotations

from octavo.v1 import inference_pb2

from router.http.errors import invalid, unsupported
from router.http.fields import Fields
from router.http.messages import Room, struct
from router.validate import MAX_TOOLS

_Choice = inference_pb2.ToolChoice
_MODES = {"none": _Choice.MODE_NONE, "auto": _Choice.MODE_AUTO, "required": _Choice.MODE_REQUIRED}


def take_tools(fields: Fields, chat: inference_pb2.Chat, room: Room) -> None:
    """tools, tool_choice and parallel_tool_calls. Raises a 400."""
    tools = fields.take("tools")
    path = fields.path("tools")
    if tools is not None and not isinstance(tools, list):
        raise invalid(path, "must be a list of tools")
    tools = tools or []
    if len(tools) > MAX_TOOLS:
        raise invalid(path, f"must have at most {MAX_TOOLS} entries, has {len(tools)}")
    for index, tool in enumerate(tools):
        one = Fields(tool, f"{path}[{index}]")
        if one.take("type") != "function":
            raise unsupported(one.path("type"), "only functions are supported")
        struct(tool, f"{path}[{index}]", chat.tools.add(), room)
    if tools:
        chat.tool_choice.mode = _Choice.MODE_AUTO
    _take_choice(fields, chat)
    parallel = fields.flag("parallel_tool_calls")
    if parallel is not None and tools:
        chat.parallel_tool_calls = parallel
    fields.refuse(("functions", "function_call"))


def _take_choice(fields: Fields, chat: inference_pb2.Chat) -> None:
    choice = fields.take("tool_choice")
    path = fields.path("tool_choice")
    if choice is None:
        return
    if isinstance(choice, str):
        if choice not in _MODES:
            raise invalid(path, "must be none, auto, required or the function to call")
        mode, name = _MODES[choice], ""
    else:
        asked = Fields(choice, path)
        if asked.take("type") != "function":
            raise unsupported(asked.path("type"), "only a function can be asked for")
        function = asked.object("function")
        name = "" if function is None else function.text("name") or ""
        if not name or function is None:
            raise invalid(asked.path("function"), "must have a name")
        function.finish()
        asked.finish()
        mode = _Choice.MODE_NAMED
    if not chat.tools:
        if mode in (_Choice.MODE_NONE, _Choice.MODE_AUTO):
            return  # they change nothing
        raise invalid(path, "needs tools")
    chat.tool_choice.mode, chat.tool_choice.name = mode, name
