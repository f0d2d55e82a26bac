/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * The table of flows: `src/lane/kernel/table.rs`, where it is told why it is none of the kernel's own.
 *
 * A flow stands in a cell of `pool` and is found by its names in `names`, the index: by its client's, and if it is bound by that of its backend's
 * answers. A name is put into the first free slot of its line, or of one of those behind it. Two processors may put the same name into two
 * slots at once; so whoever has put one in looks once more, and takes it back when he sees another. Slots are written by compare
 * and exchange, which no store or load passes: one of the two does see the other's.
 */
#ifndef KOMAINU_TABLE_H
#define KOMAINU_TABLE_H

#include "parse.h"

enum side {
    SIDE_CLIENT,
    SIDE_ANSWERS,
};

/* One of the two names of a flow. */
struct name {
    /* The client's address, or the backend's. */
    u32 address[4];
    u32 snat[4];
    /* The client's port, or the SNAT port in the upper and the backend's in the lower half. */
    u32 ports;
    /* The service's number, or the protocol. */
    u32 last;
    u32 hash;
    u32 side;
};

#define SLOT_OF(hash, number) ((u64)(hash) << 32 | ((number) + 1))
#define SLOT_HASH(slot) ((u32)((slot) >> 32))
#define SLOT_CELL(slot) ((u32)(slot) - 1)

/* Sums that are as far from each other as the ports that they are of would fill some lines and leave others empty, for one secret in some
 * hundred: so what is summed up is mixed once more. */
#define INDEX_MIX 0x9e3779b97f4a7c15

INLINE u32 mix_sum(u64 sum)
{
    return (u32)((sum ^ sum >> 32) * INDEX_MIX >> 32);
}

/* Multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", 2014, §3): who does not know the secrets can't
 * choose clients that fall on one line. */
INLINE u32 hash_client_name(const struct config *c, const u32 *client, u32 service, u16 client_port)
{
    const u64 *s = c->secrets;
    u64 sum = s[0] + s[1] * client[0] + s[2] * client[1] + s[3] * client[2] + s[4] * client[3] + s[5] * service + s[6] * (u32)client_port;
    return mix_sum(sum);
}

INLINE u32 hash_answers_name(const struct config *c, const u32 *backend, const u32 *snat, u32 ports, u8 protocol)
{
    const u64 *s = c->secrets;
    u64 sum = s[0] + s[1] * backend[0] + s[2] * backend[1] + s[3] * backend[2] + s[4] * backend[3] + s[5] * snat[0] + s[6] * snat[1] +
              s[7] * snat[2] + s[8] * snat[3] + s[9] * ports + s[10] * protocol;
    return mix_sum(sum);
}

INLINE struct flow *flow_at(u32 number)
{
    u32 at = number >> BLOCK_SHIFT;
    void *block = map_lookup(&pool, &at);
    if (!block)
        return 0;
    at = number & (BLOCK_FLOWS - 1);
    return map_lookup(block, &at);
}

INLINE int is_address(const u8 *a, const void *b)
{
    const u32 *x = (const u32 *)a, *y = b;
    return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]));
}

INLINE int is_of_client(const struct flow *f, const u32 *client, u32 service, u16 client_port)
{
    return is_address(f->client, client) && f->service == service && f->client_port == client_port;
}

/* The hash is that of the name. A backend without a cell of its own is known by it alone. */
INLINE int is_answered_by(const struct flow *f, const u32 *address, const u32 *snat, u32 ports, u8 protocol)
{
    if (!(f->flags & FLOW_BOUND) || !is_address(f->snat, snat) || f->snat_port != ports >> 16 || f->protocol != protocol)
        return 0;
    u32 number = f->backend;
    struct backend *b = map_lookup(&backends, &number);
    return !b || (is_address(b->address, address) && b->port == (u16)ports);
}

/* The hash is that of the name. */
INLINE int is_named(const struct flow *f, const struct name *n)
{
    return n->side == SIDE_CLIENT ? is_of_client(f, n->address, n->last, (u16)n->ports)
                                  : is_answered_by(f, n->address, n->snat, n->ports, (u8)n->last);
}

/* The slot of a line that has this hash; 0: none has. Without a branch: which slot it is no processor can foretell, and every way that a
 * search could go would be one more way through all that follows for the verifier. Where two have it what comes out is no slot. */
INLINE u64 slot_with(const struct line *line, u32 hash)
{
    u64 found = 0;
#pragma unroll
    for (int i = 0; i < LINE_SLOTS; i++) {
        u64 slot = READ_ONCE(line->slots[i]);
        /* All bits, if the difference is 0. */
        u64 mask = (u64)((s64)((slot >> 32 ^ hash) - 1) >> 63);
        OPAQUE(mask);
        found |= slot & mask;
    }
    return found;
}

/* The index that packets are looked up in. */
struct where {
    void *lines;
    u32 shift;
};

/* One of the two indices: that in force, or while INDEX_GROWS the larger one. */
INLINE struct where index_at(u64 word, u32 larger)
{
    u32 entry = INDEX_ENTRY(word) ^ larger;
    return (struct where){map_lookup(&names, &entry), larger ? INDEX_NEXT_SHIFT(word) : INDEX_SHIFT(word)};
}

/* Into which new names go. */
#define INDEX_OF_NEW(word) ((word) & INDEX_MOVES ? 1 : 0)

/* A line where a name with this hash may stand. */
INLINE struct line *line_at(struct where in, u32 hash, u32 probe)
{
    u32 at = ((hash >> in.shift) + probe) & (0xffffffff >> in.shift);
    return in.lines ? map_lookup(in.lines, &at) : 0;
}

/*
 * What follows looks into every line where a name may stand. Not static, and by numbers instead of pointers: so the kernel's verifier
 * looks at each of them once, and not once for every way that leads there.
 */

/* The cell, plus 1, of the flow of that name, unless it is the cell `but`. */
__attribute__((noinline)) u64 find_in(u64 word, u32 larger, const struct name *n, u32 but)
{
    if (!n)
        return 0;
    struct where in = index_at(word, larger & 1);
    u32 behind = 0;
    for (u32 i = 0; i < INDEX_PROBES; i++) {
        OPAQUE(i);
        struct line *line = line_at(in, n->hash, i);
        if (!line)
            return 0;
        if (!i)
            behind = READ_ONCE(line->displaced) != 0;
        for (u32 j = 0; j < LINE_SLOTS; j++) {
            OPAQUE(j);
            u64 slot = READ_ONCE(line->slots[j]);
            if (!(u32)slot || SLOT_HASH(slot) != n->hash || SLOT_CELL(slot) == but)
                continue;
            struct flow *f = flow_at(SLOT_CELL(slot));
            if (f && is_named(f, n))
                return (u32)slot;
        }
        if (!behind)
            return 0;
    }
    return 0;
}

/* Has `to` stand where `from` does, of which one is a slot with this hash and the other 0, in a line where it may stand. 0: it stands in
 * none of them. */
__attribute__((noinline)) int exchange(u64 word, u32 larger, u64 from, u64 to)
{
    struct where in = index_at(word, larger & 1);
    u32 hash = SLOT_HASH(from | to);
    struct line *home = line_at(in, hash, 0);
    if (!home)
        return 0;
    for (u32 i = 0; i < INDEX_PROBES; i++) {
        OPAQUE(i);
        struct line *line = line_at(in, hash, i);
        if (!line)
            return 0;
        /* Said before it stands there: whoever looks for it must not stop at the first line. */
        if (i && to)
            __sync_fetch_and_add(&home->displaced, 1);
        for (u32 j = 0; j < LINE_SLOTS; j++) {
            OPAQUE(j);
            if (READ_ONCE(line->slots[j]) != from || __sync_val_compare_and_swap(&line->slots[j], from, to) != from)
                continue;
            if (i && !to)
                __sync_fetch_and_add(&home->displaced, -1);
            return 1;
        }
        if (i && to)
            __sync_fetch_and_add(&home->displaced, -1);
    }
    return 0;
}

/* Puts a slot into the index. 0: no line has room. */
INLINE int put_slot(u64 word, u32 larger, u64 slot)
{
    return exchange(word, larger, 0, slot);
}

/* Takes it out again. 0: it is not there. */
INLINE int take_slot(u64 word, u32 larger, u64 slot)
{
    return exchange(word, larger, slot, 0);
}

/* The cell, plus 1, of the flow of that name, wherever it may stand. */
INLINE u64 find_anywhere(u64 word, const struct name *n, u32 but)
{
    u64 found = find_in(word, 0, n, but);
    return found || !(word & INDEX_GROWS) ? found : find_in(word, 1, n, but);
}

enum entered {
    ENTERED,
    ENTERED_TAKEN,   /* another flow has that name */
    ENTERED_NO_ROOM,
};

/* Enters the flow in the cell `number` by one of its names. */
__attribute__((noinline)) int enter(u64 word, const struct name *n, u32 number)
{
    if (!n || find_anywhere(word, n, NOBODY))
        return ENTERED_TAKEN;
    u64 slot = SLOT_OF(n->hash, number);
    if (!put_slot(word, INDEX_OF_NEW(word), slot))
        return ENTERED_NO_ROOM;
    if (likely(!find_anywhere(word, n, number)))
        return ENTERED;
    take_slot(word, INDEX_OF_NEW(word), slot);
    return ENTERED_TAKEN;
}

INLINE void copy_words(u32 *to, const u32 *from)
{
    to[0] = from[0], to[1] = from[1], to[2] = from[2], to[3] = from[3];
}

INLINE void name_client(struct name *n, const u32 *client, u32 service, u16 port, u32 hash)
{
    copy_words(n->address, client);
    n->snat[0] = 0, n->snat[1] = 0, n->snat[2] = 0, n->snat[3] = 0;
    n->ports = port;
    n->last = service;
    n->hash = hash;
    n->side = SIDE_CLIENT;
}

INLINE void name_answers(struct name *n, const u32 *backend, const u32 *snat, u32 ports, u8 protocol, u32 hash)
{
    copy_words(n->address, backend);
    copy_words(n->snat, snat);
    n->ports = ports;
    n->last = protocol;
    n->hash = hash;
    n->side = SIDE_ANSWERS;
}

/* Which name of a flow a packet carries. */
enum carried {
    CARRIES_CLIENT,    /* a client's */
    CARRIES_ANSWERS,   /* an answer of full NAT */
    CARRIES_CLIENT_AS_DESTINATION,
};

INLINE u32 answers_ports(const struct packet *p)
{
    return (u32)p->dst_port << 16 | p->src_port;
}

/* The flow of a packet that is not found at first sight. */
static __attribute__((noinline)) struct flow *find_slowly(u64 word, const struct packet *p, u32 service, u32 carried, u32 hash)
{
    struct name n;
    if (carried == CARRIES_ANSWERS)
        name_answers(&n, p->src, p->dst, answers_ports(p), p->protocol, hash);
    else if (carried == CARRIES_CLIENT)
        name_client(&n, p->src, service, p->src_port, hash);
    else
        name_client(&n, p->dst, service, p->dst_port, hash);
    u64 found = find_anywhere(word, &n, NOBODY);
    return found ? flow_at(SLOT_CELL(found)) : 0;
}

INLINE struct flow *find(const struct config *c, const struct packet *p, u32 service, u32 carried)
{
    u64 word = READ_ONCE(c->index);
    const u32 *client = carried == CARRIES_CLIENT ? p->src : p->dst;
    u16 port = carried == CARRIES_CLIENT ? p->src_port : p->dst_port;
    u32 hash = carried == CARRIES_ANSWERS ? hash_answers_name(c, p->src, p->dst, answers_ports(p), p->protocol)
                                          : hash_client_name(c, client, service, port);
    struct line *line = line_at(index_at(word, 0), hash, 0);
    if (unlikely(!line))
        return 0;
    u64 slot = slot_with(line, hash);
    if (likely((u32)slot)) {
        struct flow *f = flow_at(SLOT_CELL(slot));
        if (f && likely(carried == CARRIES_ANSWERS ? is_answered_by(f, p->src, p->dst, answers_ports(p), p->protocol)
                                                   : is_of_client(f, client, service, port)))
            return f;
    } else if (likely(!READ_ONCE(line->displaced) && !(word & INDEX_GROWS))) {
        return 0;
    }
    return find_slowly(word, p, service, carried, hash);
}

/* Functions of their own: their stacks end before others begin. */

/* The flow of a client's packet. */
static __attribute__((noinline)) struct flow *find_flow(const struct config *c, const struct packet *p, u32 service)
{
    return find(c, p, service, CARRIES_CLIENT);
}

/* The flow of a packet to a client. */
static __attribute__((noinline)) struct flow *find_flow_back(const struct config *c, const struct packet *p, u32 service)
{
    return find(c, p, service, CARRIES_CLIENT_AS_DESTINATION);
}

/* The flow of an answer of full NAT. */
static __attribute__((noinline)) struct flow *find_answered(const struct config *c, const struct packet *p)
{
    return find(c, p, 0, CARRIES_ANSWERS);
}

#endif
