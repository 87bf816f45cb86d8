"""TensorBoard's event files as bytes, for whoever writes them to append at once.

tensorboardX has the messages; its writer, a thread behind a queue, dies without a word on a full disk, after which
whoever writes waits for ever, and loses what is in its queue when the process is killed.
"""

from collections.abc import Mapping
import os
import socket
import struct
import time

from tensorboardX import record_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2


def name() -> str:
  """A new file's name, by which TensorBoard knows it as one of events."""
  return f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'


def begin(step: int) -> bytes:
  """What a file begins with; TensorBoard hides what other files have of `step` and of later ones."""
  log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  return _record(file_version='brain.Event:2') + _record(step=step, session_log=log)


def scalars(step: int, values: Mapping[str, float]) -> bytes:
  """The values of one step."""
  return b''.join(_record(step=step, summary=summary.scalar(key, value)) for key, value in values.items())


def _record(**fields) -> bytes:
  """A TFRecord: length, its checksum, the event, its checksum."""
  data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
  length = struct.pack('<Q', len(data))
  checksum = lambda part: struct.pack('<I', record_writer.masked_crc32c(part))
  return length + checksum(length) + data + checksum(data)
