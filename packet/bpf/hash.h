/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * The hashes that choose a backend, bit for bit those of `src/hash.rs`, whose known answers a test asks of these functions, too.
 * Words enter as big-endian numbers.
 */
#ifndef KOMAINU_HASH_H
#define KOMAINU_HASH_H

#include "helpers.h"

/* tables.rs HASH_SEED. */
#define HASH_SEED 0x6b6d696eu

#define ROTATE(x, n) (((x) << (n)) | ((x) >> (32 - (n))))

struct mix {
    u32 a, b, c;
};

INLINE struct mix mix_start(u32 words, u32 seed)
{
    u32 start = 0xdeadbeef + (words << 2) + seed;
    return (struct mix){start, start, start};
}

INLINE void mix_round(struct mix *m)
{
    u32 a = m->a, b = m->b, c = m->c;
    a = (a - c) ^ ROTATE(c, 4);
    c += b;
    b = (b - a) ^ ROTATE(a, 6);
    a += c;
    c = (c - b) ^ ROTATE(b, 8);
    b += a;
    a = (a - c) ^ ROTATE(c, 16);
    c += b;
    b = (b - a) ^ ROTATE(a, 19);
    a += c;
    c = (c - b) ^ ROTATE(b, 4);
    b += a;
    m->a = a, m->b = b, m->c = c;
}

INLINE u32 mix_last(const struct mix *m)
{
    u32 a = m->a, b = m->b, c = m->c;
    c = (c ^ b) - ROTATE(b, 14);
    a = (a ^ c) - ROTATE(c, 11);
    b = (b ^ a) - ROTATE(a, 25);
    c = (c ^ b) - ROTATE(b, 16);
    a = (a ^ c) - ROTATE(c, 4);
    b = (b ^ a) - ROTATE(a, 14);
    return (c ^ b) - ROTATE(b, 24);
}

/* Addresses as four words in network order, ports in network order. */
INLINE u32 hash_flow(u32 seed, int v6, const u32 *client, u16 client_port, const u32 *vip, u16 port, u8 protocol)
{
    u32 ports = (u32)swap16(client_port) << 16 | swap16(port);
    seed ^= protocol;
    if (!v6) {
        struct mix m = mix_start(3, seed);
        m.a += swap32(client[3]);
        m.b += swap32(vip[3]);
        m.c += ports;
        return mix_last(&m);
    }
    struct mix m = mix_start(9, seed);
    m.a += swap32(client[0]);
    m.b += swap32(client[1]);
    m.c += swap32(client[2]);
    mix_round(&m);
    m.a += swap32(client[3]);
    m.b += swap32(vip[0]);
    m.c += swap32(vip[1]);
    mix_round(&m);
    m.a += swap32(vip[2]);
    m.b += swap32(vip[3]);
    m.c += ports;
    return mix_last(&m);
}

INLINE u32 hash_client(u32 seed, int v6, const u32 *client)
{
    if (!v6) {
        struct mix m = mix_start(1, seed);
        m.a += swap32(client[3]);
        return mix_last(&m);
    }
    struct mix m = mix_start(4, seed);
    m.a += swap32(client[0]);
    m.b += swap32(client[1]);
    m.c += swap32(client[2]);
    mix_round(&m);
    m.a += swap32(client[3]);
    return mix_last(&m);
}

/* From which the first candidate for a SNAT port follows; `service` and `backend` are cluster-wide numbers. */
INLINE u32 hash_snat(u32 seed, int v6, const u32 *client, u16 client_port, u32 service, u32 backend)
{
    u32 port = swap16(client_port);
    if (!v6) {
        struct mix m = mix_start(4, seed);
        m.a += swap32(client[3]);
        m.b += port;
        m.c += service;
        mix_round(&m);
        m.a += backend;
        return mix_last(&m);
    }
    struct mix m = mix_start(7, seed);
    m.a += swap32(client[0]);
    m.b += swap32(client[1]);
    m.c += swap32(client[2]);
    mix_round(&m);
    m.a += swap32(client[3]);
    m.b += port;
    m.c += service;
    mix_round(&m);
    m.a += backend;
    return mix_last(&m);
}

/* The cell of a place's table: fill.rs `cell_of`. Nobody outside chooses what stands in the table, and user space looks for a seed
 * that suits it, so little is asked of this hash. `words` are the first, second and last 8 bytes of a key of 20. */
INLINE u32 hash_place(u32 seed, u32 shift, u64 first, u64 second, u32 last)
{
    u64 hash = first * 0x9e3779b97f4a7c15 ^ second * 0xc2b2ae3d27d4eb4f ^ (last ^ (u64)seed << 32 ^ seed) * 0x165667b19e3779f9;
    return (u32)((hash ^ hash >> 32) * 0xff51afd7ed558ccd >> shift);
}

/* The slot of `0..size` that `hash` falls on. */
INLINE u32 hash_scale(u32 hash, u32 size)
{
    return (u32)(((u64)hash * size) >> 32);
}

#endif
