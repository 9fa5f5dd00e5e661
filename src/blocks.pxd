# cython: language_level=3
"""The grid of cells and the work of one cell, as `blocks.h` has them."""

from libc.stdint cimport int8_t, uint8_t, uint16_t

cdef extern from "blocks.h" namespace "bncore" nogil:
    struct Half:
        uint16_t bits
    struct BFloat16:
        uint16_t bits
    cppclass Grid:
        ptrdiff_t outer, channels, inner
        ptrdiff_t width, groups
        ptrdiff_t positions, blocks, room
        bint columns, weighted
        ptrdiff_t first_channel(ptrdiff_t group)
        ptrdiff_t last_channel(ptrdiff_t group)
        ptrdiff_t group_size()
        bint pairs(ptrdiff_t group, ptrdiff_t next)
    struct Purpose:
        bint weighted, packed, gapless
        int arrays
    Grid sum_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize,
                  Purpose)
    Grid map_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize,
                  Purpose)
    cppclass Weights:
        const double* values
        const int8_t* mask
        ptrdiff_t n_stride, s_stride
        bint masking, in_runs
        double total
        ptrdiff_t first_used
        bint any()
    cppclass View[T]:
        T* data
        ptrdiff_t n_stride, c_stride
    struct Epilogue:
        int activation
        double a, b
    cppclass Values:
        const float* floats
        const double* doubles
        const double* as_doubles(ptrdiff_t first, ptrdiff_t channels, double otherwise,
                                 double* room)
    struct NormalizeParameters:
        const double* mean
        const double* mean_lo
        const double* inv_std
        Values gamma, beta
    struct GradientParameters:
        const double* mean
        const double* mean_lo
        const double* inv_std
        Values gamma, beta
        const double* sum_dy
        const double* sum_dy_xhat
        const double* gate_low
        const double* gate_high
        double count

    cppclass ForwardInput[T]:
        View[const T] x, residual
        Epilogue epilogue
        Weights weights
        uint8_t* bits
        T* keep
        Purpose to_sum()
        Purpose to_map(ptrdiff_t channels, View[T] y)
    cppclass BackwardOutput[T]:
        View[T] dx, dz
    cppclass BackwardInput[T]:
        View[const T] dy, x, residual
        Epilogue epilogue
        Weights weights
        const uint8_t* bits
        T* keep
        Purpose to_sum()
        Purpose to_map(ptrdiff_t channels, const BackwardOutput[T]&)

    cppclass Kept[T]:
        @staticmethod
        ptrdiff_t size(const Grid&)
    cppclass Seams[T]:
        pass

    struct Workspace:
        double* partial
        double* shift
        double* unit
    ptrdiff_t workspace_size "bncore::Workspace::size"(const Grid&)
    Workspace workspace_of "bncore::Workspace::of"(const Grid&, double* data, ptrdiff_t group)

    # partial: (blocks, 4, C) sums, merged by the finish functions of a group
    double pilot[T](const Grid&, View[const T], const Weights&, ptrdiff_t channel)
    void moments_block[T](const Grid&, View[const T], const Weights&, const double* shift,
                          ptrdiff_t group, ptrdiff_t block, double* partial, T* keep)
    void finish_moments[T](const Grid&, View[const T], const Weights&, double* partial,
                           double* shift, ptrdiff_t group, double* unit, double* mean,
                           double* mean_lo, double* m2)
    void finish_inv_std(const Grid&, const Weights&, double eps, ptrdiff_t group,
                        const double* unit, double* var, double* inv_std)
    void normalize_block[T](const Grid&, const ForwardInput[T]&, View[T] y,
                            const NormalizeParameters&, bint stream, ptrdiff_t group,
                            ptrdiff_t block, Seams[T]*)
    const ptrdiff_t GATES_AT_ONCE "bncore::kGatesAtOnce"
    void find_gates[T](const BackwardInput[T]&, const GradientParameters&, ptrdiff_t channels,
                       ptrdiff_t part, double* gate_low, double* gate_high)
    void reduce_block[T](const Grid&, const BackwardInput[T]&, const GradientParameters&,
                         ptrdiff_t group, ptrdiff_t block, double* partial)
    void finish_sums(const Grid&, double* partial, const double* inv_std, ptrdiff_t group,
                     double* sum_dy, double* sum_dy_xhat)
    void gate_block[T](const Grid&, const BackwardInput[T]&, View[T] dz,
                       const GradientParameters&, bint stream, ptrdiff_t group, ptrdiff_t block,
                       Seams[T]*)
    void gradient_block[T](const Grid&, const BackwardInput[T]&, const BackwardOutput[T]&,
                           const GradientParameters&, bint stream, ptrdiff_t group,
                           ptrdiff_t block, Seams[T]*)
    void fixed_gradient_block[T](const Grid&, const BackwardInput[T]&, View[T] dx,
                                 const GradientParameters&, bint stream, ptrdiff_t group,
                                 ptrdiff_t block, Seams[T]*)

    # The same with the sums of another group's cell, where rows are kept and
    # grid.pairs(group, next).
    void normalize_and_sum_block[T](const Grid&, const ForwardInput[T]&, View[T] y,
                                    const NormalizeParameters&, bint stream, ptrdiff_t group,
                                    ptrdiff_t block, ptrdiff_t next, const double* shift,
                                    double* partial, Seams[T]*)
    void gradient_and_sum_block[T](const Grid&, const BackwardInput[T]&,
                                   const BackwardOutput[T]&, const GradientParameters&,
                                   bint stream, ptrdiff_t group, ptrdiff_t block, ptrdiff_t next,
                                   double* partial, Seams[T]*)

cdef extern from "tickets.h" namespace "bncore" nogil:
    cppclass Tickets:
        void hand_out_groups(const Grid&, ptrdiff_t itemsize, int threads)
        void hand_out_cells(const Grid&, int threads, bint from_last)
    cppclass Turns:
        ptrdiff_t take(Tickets*)

cdef extern from "team.h" namespace "bncore" nogil:
    void join_team()

cdef extern from "scratch.h" namespace "bncore" nogil:
    cppclass Scratch:
        double* take(size_t count)
    cppclass KeptMemory[T]:
        void allocate(ptrdiff_t size, int threads)
        T* of(int thread)

ctypedef fused element:
    float
    double
    Half
    BFloat16
