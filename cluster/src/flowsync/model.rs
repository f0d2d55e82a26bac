//! A data path's flow table as simulations have it: what it gives out, and what it makes of what it is told.

use std::collections::HashMap;

use komainu_proto::domain::{GroupId, ServiceId};

use super::{Binding, Change, Name, Record, Step, Work};

/// Places, and which flow stands where.
#[derive(Debug, Default)]
pub struct Table {
    /// Each with the mark under which it was told last.
    places: Vec<Option<(Record, u32)>>,
    by_name: HashMap<Name, usize>,
    by_binding: HashMap<Binding, Name>,
    /// What the process has not yet taken.
    pub news: Vec<Change>,
}

impl Table {
    /// Remembers a flow, in the place of what it knew of it and of whatever has its binding.
    pub fn put(&mut self, record: Record, mark: u32) {
        if let Some(before) = self.get(&record.name).and_then(Record::binding) {
            self.by_binding.remove(&before);
        }
        if let Some(binding) = record.binding()
            && let Some(other) = self.by_binding.insert(binding, record.name)
        {
            self.by_name.remove(&other).map(|place| self.places[place].take());
        }
        let place = *self.by_name.entry(record.name).or_insert_with(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.places[place] = Some((record, mark));
    }

    /// Forgets a flow. Answers whether it knew it.
    pub fn remove(&mut self, name: &Name) -> bool {
        let Some((record, _)) = self.by_name.remove(name).and_then(|place| self.places[place].take()) else {
            return false;
        };
        record.binding().map(|binding| self.by_binding.remove(&binding));
        true
    }

    /// What it knows of a flow.
    pub fn get(&self, name: &Name) -> Option<&Record> {
        self.places[*self.by_name.get(name)?].as_ref().map(|(record, _)| record)
    }

    /// The flow that has a binding.
    pub fn bound(&self, binding: &Binding) -> Option<Name> {
        self.by_binding.get(binding).copied()
    }

    /// All of them.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.places.iter().flatten().map(|(record, _)| record)
    }

    /// Those that stand in `count` places from `from` on, and where to go on.
    pub fn piece(&self, from: usize, count: usize) -> (impl Iterator<Item = &Record>, Option<usize>) {
        let to = (from + count).min(self.places.len());
        let piece = self.places.get(from..to).unwrap_or_default();
        (piece.iter().flatten().map(|(record, _)| record), (to < self.places.len()).then_some(to))
    }

    /// Does what a peer has told, as the engine does it: a node with a lease takes what it lacks, which is news, and lets nothing be
    /// taken away.
    pub fn take_over(
        &mut self,
        work: &Work,
        group_of: impl Fn(ServiceId) -> GroupId,
        owns: impl Fn(GroupId) -> bool,
    ) {
        for step in &work.steps {
            match step {
                Step::Adopt(changes) => {
                    for change in changes {
                        let group = group_of(change.service());
                        if work.stale.contains(&group) {
                            continue;
                        }
                        match change {
                            Change::Known(record) if owns(group) => match self.get(&record.name) {
                                Some(known) if known == record => self.put(*record, work.mark),
                                Some(_) => {}
                                None if record
                                    .binding()
                                    .is_some_and(|b| self.by_binding.contains_key(&b)) => {}
                                None => {
                                    self.put(*record, work.mark);
                                    self.news.push(*change);
                                }
                            },
                            Change::Known(record) => self.put(*record, work.mark),
                            Change::Gone(_) | Change::Unbound(_) if owns(group) => {}
                            Change::Gone(name) => _ = self.remove(name),
                            Change::Unbound(binding) => {
                                if let Some(name) = self.bound(binding) {
                                    self.remove(&name);
                                }
                            }
                        }
                    }
                }
                Step::Sweep(groups) => {
                    let stale = self.places.iter().flatten().filter(|(record, mark)| {
                        let group = group_of(record.name.service);
                        *mark != work.mark && groups.contains(&group) && !owns(group)
                    });
                    let stale: Vec<Name> = stale.map(|(record, _)| record.name).collect();
                    stale.iter().for_each(|name| _ = self.remove(name));
                }
            }
        }
    }
}
