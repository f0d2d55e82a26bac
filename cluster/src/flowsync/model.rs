//! A data path's flow table as simulations have it: what it gives out, and what it makes of what it is told.

use std::collections::HashMap;

use komainu_proto::domain::GroupId;

use super::{Change, Name, Record, Step, Work};

/// Places, and which flow stands where.
#[derive(Debug, Default)]
pub struct Table {
    /// Each with the mark under which it was told last.
    places: Vec<Option<(Record, u32)>>,
    by_name: HashMap<Name, usize>,
    /// What the process has not yet taken.
    pub news: Vec<Change>,
}

impl Table {
    /// Remembers a flow, in the place of what it knew of it.
    pub fn put(&mut self, record: Record, mark: u32) {
        let place = *self.by_name.entry(record.name).or_insert_with(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.places[place] = Some((record, mark));
    }

    /// Forgets a flow. Answers whether it knew it.
    pub fn remove(&mut self, name: &Name) -> bool {
        let place = self.by_name.remove(name);
        place.is_some_and(|place| self.places[place].take().is_some())
    }

    /// What it knows of a flow.
    pub fn get(&self, name: &Name) -> Option<&Record> {
        self.places[*self.by_name.get(name)?].as_ref().map(|(record, _)| record)
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
        group_of: impl Fn(&Name) -> GroupId,
        owns: impl Fn(GroupId) -> bool,
    ) {
        for step in &work.steps {
            match step {
                Step::Adopt(changes) => {
                    for change in changes {
                        let (Change::Known(Record { name, .. }) | Change::Gone(name)) = change;
                        let group = group_of(name);
                        if work.stale.contains(&group) {
                            continue;
                        }
                        match change {
                            Change::Known(record) if owns(group) => match self.get(name) {
                                Some(known) if known == record => self.put(*record, work.mark),
                                Some(_) => {}
                                None => {
                                    self.put(*record, work.mark);
                                    self.news.push(*change);
                                }
                            },
                            Change::Known(record) => self.put(*record, work.mark),
                            Change::Gone(_) if owns(group) => {}
                            Change::Gone(name) => _ = self.remove(name),
                        }
                    }
                }
                Step::Sweep(groups) => {
                    let stale = self.places.iter().flatten().filter(|(record, mark)| {
                        let group = group_of(&record.name);
                        *mark != work.mark && groups.contains(&group) && !owns(group)
                    });
                    let stale: Vec<Name> = stale.map(|(record, _)| record.name).collect();
                    stale.iter().for_each(|name| _ = self.remove(name));
                }
            }
        }
    }
}
