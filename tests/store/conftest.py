"""What the tests of the store share with those of features."""

from tests.features.conftest import one_shard as one_shard
