/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/* The maps; their keys and values stand in abi.h. */
#ifndef KOMAINU_MAPS_H
#define KOMAINU_MAPS_H

#include "abi.h"

/* Numbers of entries are set by the loader where they depend on the machine or its settings. */

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct config);
} config SEC(".maps");

struct places {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
    /* Sizes, not types: what stands behind a pointer in a nested description reaches the loader as a forward declaration. */
    UINT(key_size, sizeof(u32));
    UINT(value_size, sizeof(struct place_entry));
};

/* Everything that a packet asks a plan for is in one table. The plan in force stands at one of the first two places, that of before at
 * the other; the third no packet looks at. The table is a hash table that user space has laid out: the kernel's own took 30 ns to look
 * into, more than anything else. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    UINT(max_entries, 3);
    UINT(key_size, sizeof(u32));
    INNER(values, struct places);
} generation SEC(".maps");

struct slot_table {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
    UINT(key_size, sizeof(u32));
    UINT(value_size, sizeof(struct slot_line));
};

/* Maglev tables. A table is never changed once a plan that names it is in force. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    UINT(max_entries, 1);
    UINT(key_size, sizeof(u32));
    INNER(values, struct slot_table);
} slots SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct backend);
} backends SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct service);
} services SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, FILTERS * FILTER_LINES);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct filter_line);
} filters SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, LEASES);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct lease);
} leases SEC(".maps");

struct block {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, BLOCK_FLOWS);
    UINT(map_flags, BPF_F_MMAPABLE);
    UINT(key_size, sizeof(u32));
    UINT(value_size, sizeof(struct flow));
};

/* Flows, by the numbers of their cells. User space adds blocks when they become more. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    UINT(max_entries, 1);
    UINT(key_size, sizeof(u32));
    INNER(values, struct block);
} pool SEC(".maps");

struct lines {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
    UINT(key_size, sizeof(u32));
    UINT(value_size, sizeof(struct line));
};

/* Where flows stand in the pool, by both of their names: table.h. Two entries, so that a larger one can be filled beside the first. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    UINT(max_entries, 2);
    UINT(key_size, sizeof(u32));
    INNER(values, struct lines);
} names SEC(".maps");

/* The kernel's routes, as user space sees them: where answers to clients go. bpf_fib_lookup() would say it of interfaces that
 * forward only, and the host must not forward: it would forward what is ours. */
struct {
    UINT(type, BPF_MAP_TYPE_LPM_TRIE);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_NO_PREALLOC);
    TYPE(key, struct route_key);
    TYPE(value, u64);
} routes SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_HASH);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_NO_PREALLOC);
    TYPE(key, struct neighbour_key);
    TYPE(value, u64);
} neighbours SEC(".maps");

/* The host's own addresses. */
struct {
    UINT(type, BPF_MAP_TYPE_HASH);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_NO_PREALLOC);
    TYPE(key, struct host_key);
    TYPE(value, u32);
} host SEC(".maps");

/* By processor and backend: processor × config.backends + number. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct traffic);
} traffic SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct seen);
} seen SEC(".maps");

/* By processor. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct tally);
} tally SEC(".maps");

/* By processor: how many flows it may make, and where. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct grant);
} grants SEC(".maps");

/* What user space has to learn of flows, in bytes. */
struct {
    UINT(type, BPF_MAP_TYPE_RINGBUF);
    UINT(max_entries, NEWS_BYTES);
} news SEC(".maps");

#endif
