//! The same filter in fewer instructions. The kernel translates a filter twice each time a thread enters it, which takes a third
//! of a microsecond an instruction and is in the way of every start; and seccompiler writes five instructions for a call that is
//! allowed whatever its arguments, and loads an argument again for each value that it may have.
//!
//! The program becomes a graph in which what is the same is one node, and the graph becomes a program again. That both say the
//! same of every call is tested in `src/shrink_tests.rs`.

use std::collections::HashMap;

use seccompiler::{BpfProgram, sock_filter};

// Classic BPF (linux/bpf_common.h) with the fields that are zero left out.
pub const LOAD_WORD: u16 = 0x20;
pub const AND: u16 = 0x54;
pub const JUMP_IF_EQUAL: u16 = 0x15;
pub const JUMP_IF_GREATER: u16 = 0x25;
pub const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
pub const JUMP: u16 = 0x05;
pub const RETURN: u16 = 0x06;

/// An index among the graph's nodes, whose successors come before them.
type Id = usize;

/// An instruction and what may come next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Node {
    /// The verdict.
    Return(u32),
    /// Loads the word at an offset.
    Load(u32, Id),
    /// Masks what is loaded.
    And(u32, Id),
    /// Compares, by the instruction `code`, what is loaded.
    Branch { code: u16, k: u32, yes: Id, no: Id },
}

#[derive(Default)]
struct Graph {
    nodes: Vec<Node>,
    known: HashMap<Node, Id>,
}

/// Shrinks `program`.
///
/// # Errors
/// When it has an instruction that seccompiler does not write, or that does not lead forward.
pub fn shrink(program: &[sock_filter]) -> Result<BpfProgram, String> {
    let (graph, start) = Graph::read(program)?;
    let (graph, start) = graph.without_repeated_loads(start);
    graph.write(start)
}

impl Graph {
    fn node(&mut self, node: Node) -> Id {
        if let Node::Branch { yes, no, .. } = node
            && yes == no
        {
            return yes;
        }
        *self.known.entry(node).or_insert_with(|| {
            self.nodes.push(node);
            self.nodes.len() - 1
        })
    }

    /// From the end, so that the targets of all jumps are known.
    fn read(program: &[sock_filter]) -> Result<(Self, Id), String> {
        let mut graph = Self::default();
        // Of the instructions behind the one at hand, the next one last.
        let mut ids: Vec<Id> = Vec::with_capacity(program.len());
        for &sock_filter { code, jt, jf, k } in program.iter().rev() {
            let target = |offset: u32| {
                let behind = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| offset.checked_add(1));
                let at = behind.and_then(|behind| ids.len().checked_sub(behind));
                let id = at.and_then(|at| ids.get(at).copied());
                id.ok_or_else(|| "an instruction leads out of the filter".to_owned())
            };
            let id = match code {
                RETURN => graph.node(Node::Return(k)),
                JUMP => target(k)?,
                LOAD_WORD => {
                    let next = target(0)?;
                    graph.node(Node::Load(k, next))
                }
                AND => {
                    let next = target(0)?;
                    graph.node(Node::And(k, next))
                }
                JUMP_IF_EQUAL | JUMP_IF_GREATER | JUMP_IF_GREATER_OR_EQUAL => {
                    let (yes, no) = (target(jt.into())?, target(jf.into())?);
                    graph.node(Node::Branch { code, k, yes, no })
                }
                _ => return Err(format!("{code:#x} is no instruction of seccompiler's")),
            };
            ids.push(id);
        }
        let start = ids.last().copied();
        Ok((graph, start.ok_or("an empty filter")?))
    }

    /// The graph without loads of a word that is loaded already.
    fn without_repeated_loads(&self, start: Id) -> (Self, Id) {
        let mut graph = Self::default();
        let start = self.copy(start, None, &mut graph, &mut HashMap::new());
        (graph, start)
    }

    fn copy(
        &self,
        id: Id,
        loaded: Option<u32>,
        into: &mut Self,
        done: &mut HashMap<(Id, Option<u32>), Id>,
    ) -> Id {
        if let Some(&copy) = done.get(&(id, loaded)) {
            return copy;
        }
        let copy = match self.nodes[id] {
            node @ Node::Return(_) => into.node(node),
            Node::Load(word, next) if loaded == Some(word) => self.copy(next, loaded, into, done),
            Node::Load(word, next) => {
                let next = self.copy(next, Some(word), into, done);
                into.node(Node::Load(word, next))
            }
            Node::And(mask, next) => {
                let next = self.copy(next, None, into, done);
                into.node(Node::And(mask, next))
            }
            Node::Branch { code, k, yes, no } => {
                let yes = self.copy(yes, loaded, into, done);
                let no = self.copy(no, loaded, into, done);
                into.node(Node::Branch { code, k, yes, no })
            }
        };
        done.insert((id, loaded), copy);
        copy
    }

    fn write(&self, start: Id) -> Result<BpfProgram, String> {
        let mut writer = Writer {
            graph: self,
            backwards: BpfProgram::new(),
            places: HashMap::new(),
        };
        writer.write(start)?;
        writer.backwards.reverse();
        Ok(writer.backwards)
    }
}

/// Writes from the end, so that the targets of jumps are there.
struct Writer<'a> {
    graph: &'a Graph,
    /// The last instruction first.
    backwards: BpfProgram,
    /// Where in `backwards` a node is, or a jump to it.
    places: HashMap<Id, usize>,
}

/// How far a comparison jumps at most, with room for two instructions that are put in between.
const FAR: usize = 253;

impl Writer<'_> {
    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.backwards.push(sock_filter { code, jt, jf, k });
    }

    /// How many instructions are between the one that is written next and the node.
    fn distance(&self, id: Id) -> Result<usize, String> {
        let place = self.places.get(&id);
        place
            .map(|place| self.backwards.len() - 1 - place)
            .ok_or_else(|| "a node is not written".to_owned())
    }

    fn write(&mut self, id: Id) -> Result<(), String> {
        if self.places.contains_key(&id) {
            return Ok(());
        }
        match self.graph.nodes[id] {
            Node::Return(verdict) => self.push(RETURN, 0, 0, verdict),
            Node::Load(word, next) => {
                self.follow(next)?;
                self.push(LOAD_WORD, 0, 0, word);
            }
            Node::And(mask, next) => {
                self.follow(next)?;
                self.push(AND, 0, 0, mask);
            }
            Node::Branch { code, k, yes, no } => {
                // The other alternatives are mostly behind `no`: that comes next.
                self.write(yes)?;
                self.write(no)?;
                for target in [yes, no] {
                    self.bring_near(target)?;
                }
                let offset = |distance: usize| {
                    u8::try_from(distance).map_err(|_| "a jump is too far".to_owned())
                };
                let (jt, jf) = (offset(self.distance(yes)?)?, offset(self.distance(no)?)?);
                self.push(code, jt, jf, k);
            }
        }
        self.places.insert(id, self.backwards.len() - 1);
        Ok(())
    }

    /// Has `id` come next.
    fn follow(&mut self, id: Id) -> Result<(), String> {
        self.write(id)?;
        if self.distance(id)? > 0 {
            self.repeat(id)?;
        }
        Ok(())
    }

    /// Has a comparison reach `id`.
    fn bring_near(&mut self, id: Id) -> Result<(), String> {
        if self.distance(id)? > FAR {
            self.repeat(id)?;
        }
        Ok(())
    }

    /// Writes a verdict once more, or a jump to anything else, which stands for it from now on.
    fn repeat(&mut self, id: Id) -> Result<(), String> {
        if let Node::Return(verdict) = self.graph.nodes[id] {
            self.push(RETURN, 0, 0, verdict);
        } else {
            let distance = self.distance(id)?;
            let distance = u32::try_from(distance).map_err(|error| error.to_string())?;
            self.push(JUMP, 0, 0, distance);
        }
        self.places.insert(id, self.backwards.len() - 1);
        Ok(())
    }
}
