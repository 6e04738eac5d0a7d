"""The one validation of JSON that comes from files and from judges."""


def check(value, shape, name):
    """ValueError where a JSON value does not have a shape; `name` says in the message which value it is.

    shape: a type (never met by a bool), [shape] for a list, {key: shape} for an object, "key?" for an
    optional key.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {repr(value)[:40]} where {getattr(kind, '__name__', kind)} is expected")
    if isinstance(shape, list):
        for item in value:
            check(item, shape[0], name)
    elif isinstance(shape, dict):
        for key, part in shape.items():
            required, key = not key.endswith("?"), key.rstrip("?")
            if required or key in value:
                check(value.get(key), part, f"{name}.{key}")
