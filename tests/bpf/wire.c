// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only
// The programs at the two ends of the packets-per-second benchmark: a generator, a counter, and what a data path
// is compared with. Loaded by tests/src/bench/wire.rs.
#include "helpers.h"

#define ETH_LEN 14
#define SOURCE (ETH_LEN + 12)
#define PORTS (ETH_LEN + 20)
#define URGENT (ETH_LEN + 20 + 18)
#define CHECKSUM (ETH_LEN + 20 + 16)
#define FLAGS (ETH_LEN + 20 + 13)
#define HEADERS 54
// The headers in whole words; the smallest frame is longer.
#define WORDS 7
#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define ACK 0x10
#define SEQUENCE (ETH_LEN + 20 + 4)
#define ACKNOWLEDGED (ETH_LEN + 20 + 8)
// Connections that are begun before a connection's next segment is sent: time for the answer to come.
#define LAG 512
// Connections whose next segment was sent and has not arrived, at most: what is measured is what a data path takes on, not what it
// does with what it can't. Fewer than what a proxy is late with when it is reset.
#define WINDOW 256
// Frames not sent because of that, some 50 ms, after which what is still not passed on is given up.
#define PATIENCE (1 << 20)

// Ethernet, IPv4 and TCP headers of every frame, but for what tells flows apart. Set before loading. In words, because what the
// generator takes is taken from every data path alike, and makes the best look less good.
const volatile u64 template[WORDS];
// Number of flows. Set before loading.
const volatile u32 flows;
// TCP port of the service. Set before loading.
const volatile u16 service;
// Whether the backend's answers are sent back the way that the question came. Set before loading.
const volatile u32 answered = 1;

// Last number drawn.
u64 drawn = 1;

// What arrived: 0: all frames; 1: those that only acknowledge.
struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 2);
    TYPE(key, u32);
    TYPE(value, u64);
} counted SEC(".maps");

// Frames of `generate_connections` so far.
struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, u64);
} begun SEC(".maps");

// Connections that were begun, those whose ACK arrived, and those given up.
u64 called, passed_on, given_up;
u32 waited;

// Whether a connection may be begun when so many may be open.
static inline __attribute__((always_inline)) int may_begin(u64 window)
{
    u64 open = called - READ_ONCE(passed_on);

    if (open - given_up >= window) {
        if (++waited < PATIENCE)
            return 0;
        given_up = open;
    }
    waited = 0;
    called++;
    return 1;
}

// A byte of a segment that is the lower one of its 16 bits, and the segment's checksum with it (RFC 1624, equation 3).
static inline __attribute__((always_inline)) void change(unsigned char *data, u32 at, unsigned char to)
{
    u32 sum = (u16)~(data[CHECKSUM] << 8 | data[CHECKSUM + 1]);

    sum += (u16)~data[at] + (u32)to;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    data[CHECKSUM] = ~sum >> 8;
    data[CHECKSUM + 1] = ~sum;
    data[at] = to;
}

// Flows differ in the source port and, beyond 32768 of them, in the lower half of the source address. The IP
// identification and the TCP urgent pointer take up the differences, so that both checksums of the template stay right.
static inline __attribute__((always_inline)) int make(struct xdp_md *ctx, u32 flow, unsigned char flags)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    u16 port, address, both;
    u32 sum;

    if (data + WORDS * sizeof(u64) > end)
        return XDP_ABORTED;
#pragma unroll
    for (int i = 0; i < WORDS; i++)
        ((u64 *)data)[i] = template[i];
    port = 1024 + (flow & 0x7fff);
    address = 1 + (flow >> 15);
    data[ETH_LEN + 4] = ~(address >> 8);
    data[ETH_LEN + 5] = ~address;
    data[SOURCE + 2] = address >> 8;
    data[SOURCE + 3] = address;
    data[PORTS] = port >> 8;
    data[PORTS + 1] = port;
    sum = (u32)port + address;
    both = ~(u16)((sum & 0xffff) + (sum >> 16));
    data[URGENT] = both >> 8;
    data[URGENT + 1] = both;
    if (flags != ACK)
        change(data, FLAGS, flags);
    return XDP_TX;
}

// The upper bits of a linear congruential generator (Knuth, The Art of Computer Programming, volume 2, 3.3.4, MMIX): it has one
// processor to itself.
static inline __attribute__((always_inline)) u32 any_flow(void)
{
    drawn = drawn * 6364136223846793005ull + 1442695040888963407ull;
    return (drawn >> 33) * flows >> 31;
}

// An ACK of an established connection.
SEC("xdp")
int generate(struct xdp_md *ctx)
{
    return make(ctx, any_flow(), ACK);
}

// A connection's first segment.
SEC("xdp")
int generate_first(struct xdp_md *ctx)
{
    return make(ctx, any_flow(), SYN);
}

// One connection after the other, as many as arrive, each by a SYN, an ACK, and an RST, `LAG` connections apart: the template's sequence number,
// 1, is that of the SYN.
SEC("xdp")
int generate_connections(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    u32 zero = 0, step;
    u64 *n = map_lookup(&begun, &zero);
    u64 i;

    if (!n)
        return XDP_ABORTED;
    step = *n % 3;
    // The ACKs of the last `LAG` are not sent yet.
    if (step == 0 && !may_begin(WINDOW + LAG))
        return XDP_DROP;
    i = *n / 3 + 2 * LAG;
    *n += 1;
    if (make(ctx, (i - step * LAG) % flows, step == 0 ? SYN : step == 1 ? ACK : RST | ACK) != XDP_TX)
        return XDP_ABORTED;
    // For the verifier, which has lost sight of it.
    data = (void *)(long)ctx->data;
    end = (void *)(long)ctx->data_end;
    if (data + HEADERS > end)
        return XDP_ABORTED;
    if (step) {
        change(data, SEQUENCE + 3, 2);
        change(data, ACKNOWLEDGED + 3, 2);
    }
    return XDP_TX;
}

// Connections to a proxy, as many as it passes on: each is begun by a SYN, and reset when `LAG` others have been begun. The other
// segments of both its sides are `count_ends`'s.
SEC("xdp")
int generate_calls(struct xdp_md *ctx)
{
    unsigned char *data, *end;
    u32 zero = 0;
    u64 *n = map_lookup(&begun, &zero);

    if (!n)
        return XDP_ABORTED;
    if (*n & 1) {
        *n += 1;
        if (make(ctx, (*n / 2 + LAG) % flows, RST | ACK) != XDP_TX)
            return XDP_ABORTED;
        data = (void *)(long)ctx->data;
        end = (void *)(long)ctx->data_end;
        if (data + HEADERS > end)
            return XDP_ABORTED;
        change(data, SEQUENCE + 3, 2);
        return XDP_TX;
    }
    if (!may_begin(WINDOW))
        return XDP_DROP;
    *n += 1;
    return make(ctx, (*n / 2 + 2 * LAG) % flows, SYN);
}

// Changes two runs of bytes for one another.
#define EXCHANGE(a, b, length)                 \
    do {                                       \
        unsigned char kept[length];            \
        __builtin_memcpy(kept, a, length);     \
        __builtin_memcpy(a, b, length);        \
        __builtin_memcpy(b, kept, length);     \
    } while (0)

// Answers a connection's first segment, so that a data path that looks at both sides takes the connection for established.
static inline __attribute__((always_inline)) int answer(unsigned char *data)
{
    if (data[FLAGS] != SYN || !answered)
        return XDP_DROP;
    EXCHANGE(data, data + 6, 6);
    EXCHANGE(data + SOURCE, data + SOURCE + 4, 4);
    EXCHANGE(data + PORTS, data + PORTS + 2, 2);
    change(data, FLAGS, SYN | ACK);
    change(data, ACKNOWLEDGED + 3, 2);
    return XDP_TX;
}

// A backend that counts what arrives.
SEC("xdp")
int count(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    u32 which = 0;
    u64 *n = map_lookup(&counted, &which);

    if (n)
        *n += 1;
    return data + HEADERS > end ? XDP_DROP : answer(data);
}

// A backend that counts connections, by their ACKs.
SEC("xdp")
int count_connections(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    u32 which = 1;
    u64 *n = map_lookup(&counted, &which);

    if (data + HEADERS > end || !n)
        return XDP_DROP;
    if (data[FLAGS] == ACK) {
        *n += 1;
        __sync_fetch_and_add(&passed_on, 1);
    }
    return answer(data);
}

// Sequence and acknowledgement number of a segment, in network order, and its flags, with its checksum (RFC 1624, equation 3).
static inline __attribute__((always_inline)) void renumber(unsigned char *data, u32 seq, u32 ack, u32 flags)
{
    u16 *at = (u16 *)(data + SEQUENCE), *check = (u16 *)(data + CHECKSUM);
    u16 after[5] = {seq, seq >> 16, ack, ack >> 16, (at[4] & 0xff) | flags << 8};
    u32 sum = (u16)~*check;

#pragma unroll
    for (int i = 0; i < 5; i++) {
        sum += (u16)~at[i] + (u32)after[i];
        at[i] = after[i];
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    *check = ~sum;
}

// Both ends of what a proxy makes of a connection: the client, which acknowledges the proxy's answer, and the server, which answers
// the proxy's first segment, counts its acknowledgement, and wants nothing more when it is told of the end.
SEC("xdp")
int count_ends(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    u32 which = 1, seq, ack, flags;
    u64 *n = map_lookup(&counted, &which);
    int to_server;

    if (data + HEADERS > end || !n)
        return XDP_DROP;
    flags = data[FLAGS];
    seq = *(u32 *)(data + SEQUENCE);
    ack = *(u32 *)(data + ACKNOWLEDGED);
    to_server = *(u16 *)(data + PORTS + 2) == swap16(service);
    if (to_server && flags == ACK) {
        *n += 1;
        __sync_fetch_and_add(&passed_on, 1);
        return XDP_DROP;
    }
    if (to_server && flags == SYN)
        renumber(data, swap32(1), swap32(swap32(seq) + 1), SYN | ACK);
    else if (to_server && flags & FIN)
        renumber(data, ack, 0, RST);
    else if (!to_server && flags == (SYN | ACK))
        renumber(data, ack, swap32(swap32(seq) + 1), ACK);
    else
        return XDP_DROP;
    EXCHANGE(data, data + 6, 6);
    EXCHANGE(data + SOURCE, data + SOURCE + 4, 4);
    EXCHANGE(data + PORTS, data + PORTS + 2, 2);
    return XDP_TX;
}

// The least that a balancer in the driver can do: change the MAC addresses and send.
SEC("xdp")
int reflect(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    unsigned char mac[6];

    if (data + ETH_LEN > end)
        return XDP_ABORTED;
    __builtin_memcpy(mac, data, 6);
    __builtin_memcpy(data, data + 6, 6);
    __builtin_memcpy(data + 6, mac, 6);
    return XDP_TX;
}

// On interfaces whose data path is further up: without it a veth takes no frames from the generator.
SEC("xdp")
int pass(struct xdp_md *ctx)
{
    (void)ctx;
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
