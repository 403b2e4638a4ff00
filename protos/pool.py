"""The descriptor pool that holds our messages, and nobody else's.

Several packages (tritonclient, MLServer, KServe) put their own `inference.*` messages into protobuf's default pool, and
two of them in one process fail with "duplicate symbol". Ours stay out of it: the names on the wire are the same, the
classes are not.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
