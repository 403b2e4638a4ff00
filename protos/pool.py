"""A descriptor pool that holds only this package's messages.

tritonclient, MLServer and KServe each register their own `inference.*` messages in protobuf's default pool, and any two
of them in one process fail with "duplicate symbol". A pool of our own avoids the clash; the names on the wire stay the
same.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
