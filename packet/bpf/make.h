/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * Kept flows: flows of full NAT that are made here and whose states are kept here (FLOW_KEPT). The engine learns of both by the ring
 * `news`, ages and forgets them; it alone takes them out of the maps.
 *
 *   - A port below SNAT_PORT_UPPER belongs to whoever first enters a flow by it for its backend, program or engine; those above are
 *     the engine's. The candidates are those of `src/engine/nat.rs`, so that another node derives the same.
 *   - So many flows are made as user space has granted the processor, in cells that it was given for them: how many there is room for, of
 *     them half-open ones. Beyond that, in a flood, first packets go up as if nothing were made here.
 *   - Nothing is written that is not told: without room for the news the packet goes up.
 *   - State, flags and port of a flow are one word, changed by compare and exchange. Its version tells user space which of two pieces of
 *     news of different processors is the later one.
 */
#ifndef KOMAINU_MAKE_H
#define KOMAINU_MAKE_H

#include "select.h"

/* Ports that are tried before a first packet goes up. */
#define MAKE_PROBES 16
/* Tries to change a flow that others change too. */
#define CHANGE_TRIES 4

#define WORD_FLAGS(word) ((word) & 0xff)
#define WORD_PROGRESS(word) ((word) >> 8 & 0xff)

INLINE u32 *word_of(struct flow *f)
{
    return (u32 *)&f->flags;
}

/* A flow's word with another state: the next version. */
INLINE u32 word_with(u32 word, u32 progress)
{
    u32 flags = (WORD_FLAGS(word) & ~FLOW_STEADY) + (1 << FLOW_VERSION_SHIFT);
    if (is_steady(progress))
        flags |= FLOW_STEADY;
    return (word & 0xffff0000) | progress << 8 | (flags & 0xff);
}

/* By words of four bytes: keys on the stack are aligned to no more. */
INLINE void copy_address(void *to, const void *from)
{
    copy_words(to, from);
}

/* Hands over a piece of news that is complete. The flow has been written: a barrier, so a sleeper is not overlooked. */
INLINE void tell(const struct config *c, struct news *n)
{
    ring_submit(n, READ_ONCE(c->flags) & CONFIG_WAKE ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/* Room for news of a flow that is made, if one may be. */
INLINE struct news *may_make(const struct grant *g, const struct tally *t)
{
    return g && t->made < READ_ONCE(g->most) ? ring_reserve(&news, sizeof(struct news), 0) : 0;
}

INLINE struct grant *own_grant(void)
{
    u32 cpu = cpu_id();
    return map_lookup(&grants, &cpu);
}

/* Lower ports of a SNAT address. */
#define LOWER_PORTS (SNAT_PORT_UPPER - SNAT_PORT_MIN)

/* The first candidate: its address, and the number of its port. 0: there is no such address. */
INLINE int first_candidate(const struct packet *p, const struct record *r, const struct backend *b, u8 *address, u32 *port)
{
    u32 hash = is_mapped((const u32 *)r->snat) ? hash_snat(HASH_SEED, 0, p->src, p->src_port, r->id, b->id)
                                               : hash_snat(HASH_SEED, 1, p->src, p->src_port, r->id, b->id);
    if (likely(r->snat_count == 1)) {
        copy_address(address, r->snat);
        *port = hash_scale(hash, LOWER_PORTS);
        return 1;
    }
    u32 first = hash_scale(hash, r->snat_count * LOWER_PORTS), table = r->snats;
    void *lines = map_lookup(&slots, &table);
    if (!lines)
        return 0;
    u32 slot = first / LOWER_PORTS * SNAT_WORDS, number = slot / SLOTS_PER_LINE;
    struct slot_line *line = map_lookup(lines, &number);
    if (!line)
        return 0;
    slot %= SLOTS_PER_LINE;
    OPAQUE(slot);
    copy_address(address, &line->slots[slot & (SLOTS_PER_LINE - SNAT_WORDS)]);
    *port = first % LOWER_PORTS;
    return 1;
}

/* The number of the port that is tried as the i-th. */
INLINE u32 port_number(u32 first, u32 i)
{
    return (first + i) % LOWER_PORTS;
}

INLINE void describe(struct news *n, const struct flow *f, u32 word, u64 now, u32 kind)
{
    copy_address(n->flow.client, f->client);
    n->flow.service = f->service;
    n->flow.client_port = f->client_port;
    n->flow.reserved = 0;
    n->now = now;
    n->backend = f->backend;
    n->flags = (u8)WORD_FLAGS(word);
    n->progress = (u8)WORD_PROGRESS(word);
    n->snat_port = f->snat_port;
    copy_address(n->snat, f->snat);
    n->cpu = cpu_id();
    n->kind = kind;
}

/* Not static: as in table.h. Three functions, for all that are on the way to a name share 512 bytes of stack. */

/* Writes a new flow into the next of the processor's cells, its candidate for a port in the place of the port. The number of the cell,
 * plus 1; 0: none may be made. */
__attribute__((noinline)) u64 begin_flow(const struct packet *p, const struct record *r, u32 backend, u64 now)
{
    u32 zero = 0, cpu = cpu_id();
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    struct grant *g = map_lookup(&grants, &cpu);
    struct backend *b = map_lookup(&backends, &backend);
    if (!p || !r || !c || !t || !b || !g || t->taken >= READ_ONCE(g->given) || t->made >= READ_ONCE(g->most))
        return 0;
    u32 number = READ_ONCE(g->cells[t->taken % GRANT_CELLS]), at = 0;
    struct flow *f = flow_at(number);
    if (!f || !first_candidate(p, r, b, f->snat, &at))
        return 0;
    u32 state = p->protocol == PROTO_UDP ? STATE_UDP : STATE_SYN_SENT;
    f->last_seen = now;
    f->backend = backend;
    WRITE_ONCE(*word_of(f), at << 16 | state << 8 | FLOW_BOUND | FLOW_KEPT);
    copy_address(f->client, p->src);
    f->service = r->service;
    f->client_port = p->src_port;
    f->protocol = p->protocol;
    f->reserved = 0;
    f->client_hash = hash_client_name(c, p->src, r->service, p->src_port);
    return (u64)number + 1;
}

/* Finds a port for it, and enters it by the name of its answers. 0: there is none nearby, or no room. */
__attribute__((noinline)) int bind_flow(u32 number)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    struct flow *f = flow_at(number);
    if (!c || !f)
        return 0;
    u32 backend = f->backend, word = READ_ONCE(*word_of(f)), first = word >> 16;
    struct backend *b = map_lookup(&backends, &backend);
    if (!b)
        return 0;
    struct name name;
    name_answers(&name, (const u32 *)b->address, (const u32 *)f->snat, 0, f->protocol, 0);
    for (u32 i = 0; i < MAKE_PROBES; i++) {
        OPAQUE(i);
        u32 port = swap16((u16)(SNAT_PORT_MIN + port_number(first, i)));
        name.ports = port << 16 | b->port;
        name.hash = hash_answers_name(c, name.address, name.snat, name.ports, (u8)name.last);
        f->answers_hash = name.hash;
        WRITE_ONCE(*word_of(f), port << 16 | (word & 0xffff));
        int entered = enter(READ_ONCE(c->index), &name, number);
        if (entered != ENTERED_TAKEN)
            return entered == ENTERED;
    }
    return 0;
}

/* Enters it by its client's name, and tells of it. 0: it was not made after all. */
__attribute__((noinline)) int commit_flow(u32 number)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    struct flow *f = flow_at(number);
    if (!c || !t || !f)
        return 0;
    u64 index = READ_ONCE(c->index);
    struct news *n = ring_reserve(&news, sizeof(struct news), 0);
    if (n) {
        struct name name;
        name_client(&name, (const u32 *)f->client, f->service, f->client_port, f->client_hash);
        if (enter(index, &name, number) == ENTERED) {
            t->taken++;
            t->made++;
            describe(n, f, *word_of(f), f->last_seen, NEWS_OPENED);
            tell(c, n);
            return 1;
        }
        /* Another processor has another first packet of it, or there is no room. */
        ring_discard(n, 0);
    }
    u64 slot = SLOT_OF(f->answers_hash, number);
    /* It may have moved meanwhile. */
    if (!take_slot(index, INDEX_OF_NEW(index), slot) && index & INDEX_GROWS)
        take_slot(index, !INDEX_OF_NEW(index), slot);
    return 0;
}

/* Makes a flow for its first packet, a SYN or datagram. 0: the engine is to do it. */
INLINE struct flow *make_flow(const struct packet *p, const struct record *r, u32 backend, u64 now)
{
    u64 cell = begin_flow(p, r, backend, now);
    return cell && bind_flow(SLOT_CELL(cell)) && commit_flow(SLOT_CELL(cell)) ? flow_at(SLOT_CELL(cell)) : 0;
}

/* Whether the flow has the first port from the candidate with this number on that others leave it. */
__attribute__((noinline)) int comes_to_its_port(struct flow *f, u32 first)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    if (!f || !c)
        return 0;
    u32 backend = f->backend;
    struct backend *b = map_lookup(&backends, &backend);
    if (!b)
        return 0;
    struct name other;
    name_answers(&other, (const u32 *)b->address, (const u32 *)f->snat, 0, f->protocol, 0);
    for (u32 i = 0; i < MAKE_PROBES; i++) {
        OPAQUE(i);
        u16 port = swap16((u16)(SNAT_PORT_MIN + port_number(first, i)));
        if (port == f->snat_port)
            return 1;
        other.ports = (u32)port << 16 | b->port;
        other.hash = hash_answers_name(c, other.address, other.snat, other.ports, (u8)other.last);
        if (!find_anywhere(READ_ONCE(c->index), &other, NOBODY))
            return 0;
    }
    return 0;
}

/* A SYN opens a closing flow again, on the same backend and port: what the engine does when it forgets the flow and makes a new one, if
 * that is the first candidate that others leave it. 0: the engine is to do it. */
__attribute__((noinline)) int reopen_flow(struct flow *f, const struct packet *p, const struct record *r, u64 now)
{
    if (!f || !p || !r)
        return 0;
    u32 zero = 0, number = f->backend;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    struct backend *b = map_lookup(&backends, &number);
    if (!c || !t || !b)
        return 0;
    u32 before = READ_ONCE(*word_of(f));
    u64 silent = now - READ_ONCE(f->last_seen);
    /* The other processor's clock may be ahead. */
    if (silent >> 63)
        silent = 0;
    if (silent >= r->reopen || !reopens(WORD_PROGRESS(before)))
        return 0;

    u32 at = 0, snat[4];
    if (!first_candidate(p, r, b, (u8 *)snat, &at) || !is_address(f->snat, snat) || !comes_to_its_port(f, at))
        return 0;
    /* It takes no cell, but is one more that is half-open. */
    struct news *n = may_make(own_grant(), t);
    if (!n)
        return 0;
    u32 after = word_with(before, STATE_SYN_SENT);
    if (__sync_val_compare_and_swap(word_of(f), before, after) != before) {
        ring_discard(n, 0);
        return 0;
    }
    WRITE_ONCE(f->last_seen, now);
    t->made++;
    describe(n, f, after, now, NEWS_OPENED);
    tell(c, n);
    return 1;
}

/* Takes note of a segment of a kept flow. 0: it could not be written or told, and the segment is the engine's. */
__attribute__((noinline)) int note_segment(struct flow *f, u32 tcp_flags, u32 to_client, u64 now)
{
    if (!f)
        return 0;
    u32 word = READ_ONCE(*word_of(f)), segment = segment_of(tcp_flags);
    if (advance(WORD_PROGRESS(word), segment, to_client) == WORD_PROGRESS(word))
        return 1;
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    if (!c)
        return 0;
    struct news *n = ring_reserve(&news, sizeof(*n), 0);
    if (!n)
        return 0;
    for (int i = 0; i < CHANGE_TRIES; i++) {
        u32 before = READ_ONCE(*word_of(f));
        u32 progress = advance(WORD_PROGRESS(before), segment, to_client);
        if (progress == WORD_PROGRESS(before)) {
            ring_discard(n, 0);
            return 1;
        }
        /* It has just been taken out. */
        if (!(before & FLOW_KEPT))
            break;
        u32 after = word_with(before, progress);
        if (__sync_val_compare_and_swap(word_of(f), before, after) == before) {
            describe(n, f, after, now, NEWS_CHANGED);
            tell(c, n);
            return 1;
        }
    }
    ring_discard(n, 0);
    return 0;
}

#endif
