"""Chat messages, the text of records, and parsing of chat turns."""

from fedllm_flwr.data.faults import UnusableRecord, require_unicode

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Messages = list[Message]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def parse_turn(turn: object) -> Message:
    """One turn of a chat, as {role, content} or {from, value}."""
    if not isinstance(turn, dict):
        raise UnusableRecord("a turn of the chat is not an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableRecord(f"unknown role {role!r} in the chat; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UnusableRecord("a turn of the chat has no text")
    require_unicode(content)
    return {"role": ROLES[role], "content": content}
