"""Reads conversations, in the names that data sets give to roles and fields."""

from typing import Any

from tabom.data.fields import RecordError, check_unicode

CONVERSATION_FIELDS = ("messages", "conversations")

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
ROLES |= {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "model", "bot"), "assistant")}
ROLES |= dict.fromkeys(("observation", "tool_response", "function_response", "ipython"), "tool")
"""Names of roles in data sets, in lower case, and in chat templates."""

CALLS = ("function_call", "tool_call")
"""Roles in ShareGPT's records that stand for a call of a tool."""

SHAREGPT = {"from": "role", "value": "content"}
"""ShareGPT's names of a message's fields."""

EXPECTED = 'expected a list of {"role": ..., "content": ...} messages'


def conversation(record: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """A field that must be a conversation, in the names of chat templates (see ROLES and SHAREGPT).

    The content of each message is one text. `tool_calls` of the assistant are kept for the chat template.

    Raises:
        RecordError: the field is no conversation, or holds something other than text.
    """
    messages = record[field]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RecordError(field, EXPECTED)
    return [parse_message(message, field) for message in messages]


def parse_message(message: dict[str, Any], field: str) -> dict[str, Any]:
    """One message of a conversation. Fields that are None, as Arrow fills them in, are left out."""
    message = without_none(message)
    if "role" not in message:
        message = {SHAREGPT.get(name, name): value for name, value in message.items()}
    check_calls(message.get("tool_calls", []), field)
    content = message.get("content", "" if message.get("tool_calls") else None)
    content = joined(content, field) if isinstance(content, list) else content
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise RecordError(field, EXPECTED)
    check_unicode(field, content)
    name = message["role"].lower()
    if name in CALLS:
        raise RecordError(field, f"role {name!r}: a call of a tool; give it as tool_calls of an assistant's message")
    if name not in ROLES:
        raise RecordError(field, f"role {message['role']!r:.60}: expected one of {', '.join(ROLES)}")
    return message | {"role": ROLES[name], "content": content}


def joined(parts: list[Any], field: str) -> str:
    """The text of a message whose content is a list of `{"type": "text", "text": ...}`."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
            raise RecordError(field, EXPECTED)
        if part.get("type") != "text" or "text" not in part:
            raise RecordError(field, f"a part of type {part.get('type')!r:.60}; only text is read")
    return "".join(part["text"] for part in parts)


def check_calls(calls: Any, field: str) -> None:
    """Raises a RecordError if `tool_calls` are not in the form that chat templates take."""
    functions = [call.get("function") if isinstance(call, dict) else None for call in calls or []]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        raise RecordError(
            field,
            f'tool_calls: expected a list of {{"function": {{"name": ..., "arguments": ...}}}}, got {calls!r:.60}',
        )


def without_none(value: Any) -> Any:
    """A JSON value without the fields that are None, as Arrow fills them in."""
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value
