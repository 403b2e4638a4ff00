"""What is wrong with a JSON file, in plain words."""

import json


def describe_json_error(error: Exception) -> str:
    """Returns why a file's content is not the JSON that its reader expects.

    Args:
        error: what `json.loads`, or a look into what it returned, raised.
    """
    match error:
        case json.JSONDecodeError():
            return f"it is not JSON: {error}"
        case UnicodeDecodeError():
            return "it is not JSON: it is not UTF-8"
        case RecursionError():
            return "its values are nested too deep"
        case KeyError():
            return f"it has no {error}"  # with quotes around the key
        case ValueError():
            return str(error)
        case _:
            return f"a value is of a wrong type: {error}"
