"""Makes Triton's interpreter more than twice as fast: it works the same things out at every operation.

Nothing is computed otherwise: a patch of the language, the types of blocks and what tensors say of their
type are remembered.
"""

from triton.language import core
from triton.runtime import interpreter

_block_type, _tensor, _np_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
_patched: set[str] = set()
_block_types: dict[tuple, dict] = {}
_shapes: dict[str, tuple] = {}
_np_dtypes: dict[str, object] = {}


def install() -> None:
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter._get_np_dtype = _remembered_np_dtype
    core.block_type.__init__ = _init_block_type
    core.tensor.__init__ = _init_tensor
    core.tuple_type.__init__ = _init_tuple_type
    core.tuple_type.name = property(_name_of_tuple_type)


def _call_device_function(self, *args, **kwargs):
    """The language is patched at every call of a device function; once for each module does."""
    module = self.fn.__globals__["__name__"]
    if module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _remembered_np_dtype(dtype):
    name = dtype.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(dtype)
    return _np_dtypes[name]


def _init_block_type(self, element_ty, shape):
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])


def _init_tensor(self, handle, type):
    if type.name not in _shapes:
        _tensor(self, handle, type)
        _shapes[type.name] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[type.name]


def _init_tuple_type(self, types, fields=None):
    self.types, self.fields = types, fields or [""] * len(types)


def _name_of_tuple_type(self):
    """Written at once otherwise, and read by nobody."""
    parts = (f"{field}:{kind}" for field, kind in zip(self.fields, self.types, strict=True))
    return f"[{','.join(parts)}]"
