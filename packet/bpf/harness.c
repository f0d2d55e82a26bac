/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * What tests and benchmarks put around the program; nothing of it is ever attached.
 *
 * `vary` makes each run of a test another packet: it writes the template anew, as the next flow's, and calls what is to be measured.
 * What that takes beyond an empty program called in the same way is the program's own cost.
 */
#include "abi.h"
#include "hash.h"
#include "state.h"

#define TEMPLATE 96

struct bench {
    /* Runs so far. */
    u64 runs;
    u32 flows;
    /* 1: IPv4; 0: IPv6. */
    u32 v4;
    u8 frame[TEMPLATE];
};
_Static_assert(sizeof(struct bench) == 16 + TEMPLATE, "size of bench");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    UINT(map_flags, BPF_F_MMAPABLE);
    TYPE(key, u32);
    TYPE(value, struct bench);
} bench SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_PROG_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, u32);
} measured SEC(".maps");

/* In the program these types stand behind nested descriptions of maps, where BTF does not reach: here a test can look at them. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct place_entry);
} places_layout SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_HASH);
    UINT(max_entries, 1);
    TYPE(key, struct flow_key);
    TYPE(value, struct flow);
} flows_layout SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct line);
} lines_layout SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct slot_line);
} slots_layout SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct news);
} news_layout SEC(".maps");

static long (*const tail_call)(void *ctx, void *map, u32 index) = (void *)BPF_FUNC_tail_call;

SEC("xdp.frags")
int vary(struct xdp_md *ctx)
{
    u32 zero = 0;
    struct bench *b = map_lookup(&bench, &zero);
    u8 *data = (void *)(long)ctx->data;
    if (!b || (void *)(data + TEMPLATE) > (void *)(long)ctx->data_end)
        return XDP_ABORTED;
#pragma unroll
    for (int i = 0; i < TEMPLATE; i += 8)
        *(u64 *)(data + i) = *(u64 *)(b->frame + i);
    /* Flows in no order that a cache could guess; 32 bits of the product are a permutation of those of the count. */
    u32 flow = hash_scale((u32)(b->runs++ * 0x9e3779b1u), b->flows);
    u16 port = swap16((u16)(1024 + flow % 50000));
    if (b->v4) {
        *(u32 *)(data + 26) = swap32(swap32(*(u32 *)(data + 26)) + flow / 50000);
        *(u16 *)(data + 34) = port;
        u64 sum = 0;
#pragma unroll
        for (int i = 14; i < 34; i += 4)
            sum += *(u32 *)(data + i);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        *(u16 *)(data + 24) = (u16)~sum;
    } else {
        *(u32 *)(data + 34) = swap32(swap32(*(u32 *)(data + 34)) + flow / 50000);
        *(u16 *)(data + 54) = port;
    }
    tail_call(ctx, &measured, 0);
    return XDP_ABORTED;
}

SEC("xdp.frags")
int nothing(struct xdp_md *ctx)
{
    (void)ctx;
    return XDP_TX;
}

#define CLOCK(name, helper)                                                                                                               \
    SEC("xdp.frags")                                                                                                                      \
    int name(struct xdp_md *ctx)                                                                                                          \
    {                                                                                                                                     \
        (void)ctx;                                                                                                                        \
        u64 (*const now)(void) = (void *)helper;                                                                                          \
        return now() ? XDP_TX : XDP_PASS;                                                                                                 \
    }
CLOCK(clock_boot, BPF_FUNC_ktime_get_boot_ns)
CLOCK(clock_monotonic, BPF_FUNC_ktime_get_ns)
CLOCK(clock_coarse, BPF_FUNC_ktime_get_coarse_ns)
CLOCK(clock_jiffies, BPF_FUNC_jiffies64)

/* A question to the hashes, and the answers. */
struct question {
    u32 seed;
    u32 v6;
    u16 client_port;
    u16 port;
    u32 protocol;
    u32 client[4];
    u32 vip[4];
    u32 size;
    u32 flow;
    u32 of_client;
    u32 slot;
    u32 service;
    u32 backend;
    u32 snat;
    u32 reserved;
};
_Static_assert(sizeof(struct question) == 80, "size of question");

SEC("xdp.frags")
int hashes(struct xdp_md *ctx)
{
    struct question *q = (void *)(long)ctx->data;
    if ((void *)(q + 1) > (void *)(long)ctx->data_end)
        return XDP_ABORTED;
    struct question a = *q;
    if (a.v6) {
        a.flow = hash_flow(a.seed, 1, a.client, a.client_port, a.vip, a.port, a.protocol);
        a.of_client = hash_client(a.seed, 1, a.client);
        a.snat = hash_snat(a.seed, 1, a.client, a.client_port, a.service, a.backend);
    } else {
        a.flow = hash_flow(a.seed, 0, a.client, a.client_port, a.vip, a.port, a.protocol);
        a.of_client = hash_client(a.seed, 0, a.client);
        a.snat = hash_snat(a.seed, 0, a.client, a.client_port, a.service, a.backend);
    }
    a.slot = hash_scale(a.flow, a.size);
    *q = a;
    return XDP_TX;
}

/* A state and a segment's flags, and what becomes of the state. */
struct step {
    u32 progress;
    u32 tcp_flags;
    u32 to_client;
    u32 after;
    u32 steady;
    u32 reopens;
};

SEC("xdp.frags")
int states(struct xdp_md *ctx)
{
    struct step *s = (void *)(long)ctx->data;
    if ((void *)(s + 1) > (void *)(long)ctx->data_end)
        return XDP_ABORTED;
    struct step a = *s;
    s->after = advance(a.progress, segment_of(a.tcp_flags), a.to_client);
    s->steady = is_steady(a.progress);
    s->reopens = reopens(a.progress);
    return XDP_TX;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
