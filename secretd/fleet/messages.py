# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages of etcd's API v3 that secretd-fleet uses, from a table.

Names and numbers are those of etcd's rpc.proto, kv.proto and auth.proto. Nothing is generated:
generated code breaks with other versions of protobuf. Fields have presence (proto2), so that a
comparison with 0 is sent; enumerations are numbers.
"""

from typing import Any, Final, cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE: Final = "secretd_etcd"

_TYPES: Final = {"bytes": 12, "string": 9, "int": 3, "uint": 4, "bool": 8, "enum": 5}
"""FieldDescriptorProto.Type: TYPE_BYTES, TYPE_STRING, TYPE_INT64, TYPE_UINT64, TYPE_BOOL,
TYPE_INT32.
"""

_TABLE: Final = """
Header: cluster_id=1 uint, member_id=2 uint, revision=3 int, raft_term=4 uint
KeyValue: key=1 bytes, create_revision=2 int, mod_revision=3 int, version=4 int, value=5 bytes
Event: type=1 enum, kv=2 KeyValue
RangeRequest: key=1 bytes, range_end=2 bytes, limit=3 int, revision=4 int, keys_only=8 bool
RangeResponse: header=1 Header, kvs=2 *KeyValue, more=3 bool, count=4 int
PutRequest: key=1 bytes, value=2 bytes
PutResponse: header=1 Header
DeleteRequest: key=1 bytes, range_end=2 bytes
DeleteResponse: header=1 Header, deleted=2 int
Compare: result=1 enum, target=2 enum, key=3 bytes, version=4 int, mod_revision=6 int
Operation: range=1 RangeRequest, put=2 PutRequest, delete=3 DeleteRequest
Outcome: range=1 RangeResponse, put=2 PutResponse, delete=3 DeleteResponse
TxnRequest: compare=1 *Compare, success=2 *Operation, failure=3 *Operation
TxnResponse: header=1 Header, succeeded=2 bool, responses=3 *Outcome
WatchCreate: key=1 bytes, range_end=2 bytes, start_revision=3 int, watch_id=7 int
WatchProgress:
WatchRequest: create=1 WatchCreate, progress=3 WatchProgress
WatchResponse: header=1 Header, watch_id=2 int, created=3 bool, canceled=4 bool,
  compact_revision=5 int, cancel_reason=6 string, fragment=7 bool, events=11 *Event
StatusRequest:
StatusResponse: header=1 Header, version=2 string, db_size=3 int, leader=4 uint
Nothing:
Answer: header=1 Header
UserOptions: no_password=1 bool
UserAdd: name=1 string, password=2 string, options=3 UserOptions
UserDelete: name=1 string
UserRole: user=1 string, role=2 string
RoleAdd: name=1 string
RoleDelete: role=1 string
Permission: type=1 enum, key=2 bytes, range_end=3 bytes
RoleRevoke: role=1 string, key=2 bytes, range_end=3 bytes
RolePermission: name=1 string, permission=2 Permission
"""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="secretd/etcd.proto", package=_PACKAGE)
    for line in _TABLE.replace(",\n  ", ", ").strip().splitlines():
        name, _, fields = line.partition(":")
        message = file.message_type.add(name=name)
        for field in filter(None, fields.strip().split(", ")):
            left, kind = field.split(" ")
            label, number = left.split("=")
            added = message.field.add(name=label, number=int(number))
            added.label = cast(Any, 3 if kind.startswith("*") else 1)  # LABEL_REPEATED, _OPTIONAL
            kind = kind.lstrip("*")
            if kind in _TYPES:
                added.type = cast(Any, _TYPES[kind])
            else:
                added.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
                added.type_name = f".{_PACKAGE}.{kind}"
    return file


_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def _message(name: str) -> Any:
    found = _POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}")
    return message_factory.GetMessageClass(found)


RangeRequest, RangeResponse = _message("RangeRequest"), _message("RangeResponse")
PutRequest, DeleteRequest = _message("PutRequest"), _message("DeleteRequest")
TxnRequest, TxnResponse = _message("TxnRequest"), _message("TxnResponse")
Compare, Operation = _message("Compare"), _message("Operation")
WatchRequest, WatchResponse = _message("WatchRequest"), _message("WatchResponse")
WatchCreate, WatchProgress = _message("WatchCreate"), _message("WatchProgress")
StatusRequest, StatusResponse = _message("StatusRequest"), _message("StatusResponse")
Nothing, Answer = _message("Nothing"), _message("Answer")
UserAdd, UserDelete, UserRole = _message("UserAdd"), _message("UserDelete"), _message("UserRole")
UserOptions = _message("UserOptions")
RoleAdd, RoleDelete = _message("RoleAdd"), _message("RoleDelete")
RoleRevoke = _message("RoleRevoke")
RolePermission, Permission = _message("RolePermission"), _message("Permission")

EQUAL: Final = 0
"""Compare.result: EQUAL."""

MOD: Final = 2
"""Compare.target: MOD, the revision of the last change; 0 for a key that does not exist."""

DELETED: Final = 1
"""Event.type: DELETE."""

READ: Final = 0
READWRITE: Final = 2
"""Permission.type."""
