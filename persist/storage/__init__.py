"""Everything that touches the disk: names, bytes, locks, leases, snapshots, and the transaction that joins them."""
