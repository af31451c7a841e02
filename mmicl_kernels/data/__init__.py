"""Examples of a task as records: files of them, rows of any kind, and converters of official data sets."""

from mmicl_kernels.data.digest import content_digest
from mmicl_kernels.data.images import ImageFile, image_bytes, read_image
from mmicl_kernels.data.lines import BadRecord, parse_line, read_lines
from mmicl_kernels.data.records import Demonstration, Record, Records, as_records, record_of

__all__ = [
    "BadRecord",
    "Demonstration",
    "ImageFile",
    "Record",
    "Records",
    "as_records",
    "content_digest",
    "image_bytes",
    "parse_line",
    "read_image",
    "read_lines",
    "record_of",
]
