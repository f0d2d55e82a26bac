/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * Leases, the slot rule, remembered flows, ways, and the count of what is not remembered: `src/engine/{select,sketch}.rs` as far as
 * nothing has to be written down.
 */
#ifndef KOMAINU_SELECT_H
#define KOMAINU_SELECT_H

#include "hash.h"
#include "clock.h"
#include "table.h"

/* Until when the node may forward for the group, or answer for its addresses; 0: not at all. */
INLINE u64 lease_until(u32 group, int answer)
{
    u32 cell = group % LEASES;
    struct lease *l = map_lookup(&leases, &cell);
    if (!l || READ_ONCE(l->group) != (u64)group + 1)
        return 0;
    u64 until = answer ? READ_ONCE(l->answer_until) : READ_ONCE(l->forward_until);
    /* A cell that has become another group's meanwhile permits nothing. */
    return READ_ONCE(l->group) == (u64)group + 1 ? until : 0;
}

INLINE int is_leased(const struct config *c, struct tally *t, u32 group, int answer)
{
    u64 until = lease_until(group, answer);
    return time_before(c, t, until) < until;
}

/* The plan in force. */
struct plan {
    void *table;
    u64 word;
};

INLINE struct plan plan_in_force(const struct config *c)
{
    u64 word = READ_ONCE(c->plan);
    u32 entry = PLAN_ENTRY(word);
    return (struct plan){map_lookup(&generation, &entry), word};
}

INLINE int is_at(const struct place_entry *cell, u64 first, u64 second, u32 last)
{
    const u64 *address = (const u64 *)cell->place.address;
    return address[0] == first && address[1] == second && *(const u32 *)&cell->place.port == last;
}

/* From the second cell on. */
static __attribute__((noinline)) struct record *find_further(void *table, u32 at, u64 first, u64 second, u32 last)
{
    for (int i = 1; i < PLACE_PROBES; i++) {
        at++;
        struct place_entry *cell = map_lookup(table, &at);
        if (!cell || !cell->used)
            return 0;
        if (is_at(cell, first, second, last))
            return &cell->record;
    }
    return 0;
}

INLINE struct record *find_place(struct plan plan, const u32 *address, u16 port, u8 protocol, u8 kind)
{
    u64 first = (u64)address[1] << 32 | address[0], second = (u64)address[3] << 32 | address[2];
    u32 last = (u32)kind << 24 | (u32)protocol << 16 | port;
    u32 at = hash_place(PLAN_SEED(plan.word), PLAN_SHIFT(plan.word), first, second, last);
    struct place_entry *cell = map_lookup(plan.table, &at);
    if (!cell || !cell->used)
        return 0;
    if (likely(is_at(cell, first, second, last)))
        return &cell->record;
    return find_further(plan.table, at, first, second, last);
}

/* The slot of a table that `hash` falls on. */
INLINE u32 find_slot(u32 table, u32 size, u32 hash)
{
    void *lines = map_lookup(&slots, &table);
    if (!lines)
        return 0;
    u32 slot = hash_scale(hash, size);
    u32 number = slot / SLOTS_PER_LINE;
    struct slot_line *line = map_lookup(lines, &number);
    return line ? line->slots[slot % SLOTS_PER_LINE] : 0;
}

/* Whether a segment leaves the state of a steady flow alone: flow/state.rs `Segment::Tcp`. */
INLINE int is_plain(const struct packet *p)
{
    if (p->protocol != PROTO_TCP)
        return 1;
    return !(p->flags & (TCP_RST | TCP_FIN)) && (p->flags & (TCP_SYN | TCP_ACK)) != TCP_SYN;
}

INLINE int is_syn(const struct packet *p)
{
    return p->protocol == PROTO_TCP && (p->flags & (TCP_RST | TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Whether a flow of that hash may be remembered. */
INLINE int may_be_remembered(const struct service *s, u32 hash)
{
    u32 filter = READ_ONCE(s->filter);
    if (!filter)
        return 1;
    u32 number = (filter - 1) * FILTER_LINES + (hash >> 25);
    struct filter_line *line = map_lookup(&filters, &number);
    return !line || READ_ONCE(line->bits[hash >> 22 & 7]) >> (hash >> 16 & 63) & 1;
}

INLINE void note_seen(u64 *last_seen, u64 now)
{
    if (now - READ_ONCE(*last_seen) > LAST_SEEN_STEP)
        WRITE_ONCE(*last_seen, now);
}

/* Turns the windows of `s`. Another processor that does it at the same time may lose a flow just counted. */
static __attribute__((noinline)) int turn_windows(u32 number, u64 now)
{
    struct seen *s = map_lookup(&seen, &number);
    if (!s)
        return 0;
    u64 here = now / WINDOW;
    if (here > s->window) {
        u64 *fresh = (u64 *)s->registers[here & 1], *other = (u64 *)s->registers[~here & 1];
#pragma unroll
        for (int i = 0; i < REGISTERS / 8; i++)
            fresh[i] = 0;
        if (here > s->window + 1) {
#pragma unroll
            for (int i = 0; i < REGISTERS / 8; i++)
                other[i] = 0;
        }
        WRITE_ONCE(s->window, here);
    }
    WRITE_ONCE(s->until, (here + 1) * WINDOW);
    return 0;
}

/* Counts a flow that is not remembered. */
INLINE void count_seen(u32 number, u32 hash, u64 now)
{
    struct seen *s = map_lookup(&seen, &number);
    if (!s)
        return;
    if (unlikely(now >= READ_ONCE(s->until)))
        turn_windows(number, now);
    hash = (hash ^ hash >> 16) * 0x85ebca6b;
    hash = (hash ^ hash >> 13) * 0xc2b2ae35;
    u8 *place = &s->registers[READ_ONCE(s->window) & 1][hash >> 24];
    u32 rest = hash << 8 | 1 << 7;
    u32 rank = READ_ONCE(*place);
    /* Nothing is written unless the register grows: a rank above `rank` has so many leading zeros. */
    if (rank && (rank > 31 || rest >> (32 - rank)))
        return;
    rank = 1;
#pragma unroll
    for (u32 step = 16; step; step >>= 1) {
        if (!(rest >> (32 - step))) {
            rank += step;
            rest <<= step;
        }
    }
    WRITE_ONCE(*place, (u8)rank);
}

/* The way to a client; 0 when it is not known here. */
static __attribute__((noinline)) u64 way_to(const u32 *address)
{
    struct route_key key;
    u32 *words = (u32 *)key.address;
    key.prefix_len = 128;
    words[0] = address[0], words[1] = address[1], words[2] = address[2], words[3] = address[3];
    u64 *hop = map_lookup(&routes, &key);
    if (!hop)
        return 0;
    u64 word = READ_ONCE(*hop);
    if ((word & (HOP_KNOWN | HOP_ON_LINK)) != HOP_ON_LINK)
        return word;
    struct neighbour_key neighbour;
    words = (u32 *)neighbour.address;
    words[0] = address[0], words[1] = address[1], words[2] = address[2], words[3] = address[3];
    neighbour.port = HOP_PORT(word);
    hop = map_lookup(&neighbours, &neighbour);
    return hop ? READ_ONCE(*hop) : 0;
}

/* The packets that a frame becomes on the wire: engine/core.rs `Size`. */
struct size {
    u32 largest;
    u32 packets;
    u32 bytes;
};

INLINE struct size size_of(context *ctx, const struct packet *p)
{
    struct size size = {p->len, 1, p->len};
#ifdef KOMAINU_TC
    u32 segment = ctx->gso_size, payload = p->len - p->headers;
    if (segment && p->len > p->headers && payload > segment) {
        size.largest = p->headers + segment;
        size.packets = (payload + segment - 1) / segment;
        size.bytes = payload + size.packets * p->headers;
    }
#else
    (void)ctx;
#endif
    return size;
}

INLINE struct traffic *own_traffic(const struct config *c, u32 number)
{
    u32 index = cpu_id() * c->backends + number;
    return map_lookup(&traffic, &index);
}

#endif
